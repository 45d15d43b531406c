"""The options of `tools/analyze_thinking.py`. Light to import: the help of the command line needs nothing else."""

from dataclasses import dataclass
from pathlib import Path

from megatron_tpt.config.fields import PositiveInt, check_bounds
from megatron_tpt.errors import UserError
from megatron_tpt.records import OnBadRecord


@dataclass(frozen=True)
class AnalysisOptions:
    """Which records to look at, and what to compare."""

    input: list[str]
    """Records with thinking: files, or folders of them."""
    by: str
    """Columns of `meta` to group by, with commas between, as in "domain,reasoning": a table and a picture for each. A
    dot leads into nested columns, as in "labels.level"."""
    output: Path
    """A folder for report.md, and COLUMN.csv and COLUMN.png of every column; what is there is replaced."""
    min_documents: PositiveInt = 30
    """Groups with fewer documents are merged into "(other)": below 30 documents an interval of the mean says little."""
    limit: PositiveInt | None = None
    """Read only this many records."""
    on_bad_record: OnBadRecord = "stop"
    """Stop at a record without usable text, or skip it and count it."""

    def __post_init__(self) -> None:
        if not all(self.columns):
            raise UserError(f"--by {self.by!r}: give columns of meta with commas between, as in domain,reasoning")
        check_bounds(self)

    @property
    def columns(self) -> list[str]:
        """The columns to group by, each once."""
        return list(dict.fromkeys(name.strip() for name in self.by.split(",")))
