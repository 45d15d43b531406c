"""The results for the documents of a corpus, for programs and for people."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_tpt.files import atomic_write, write_json
from megatron_tpt.markdown import code, inline
from megatron_tpt.names import counted

_SHOWN_ITEMS = 20


@dataclass(frozen=True)
class Report:
    """Counts that add up: num_rows = num_kept + sum(dropped)."""

    num_sources: int
    num_rows: int
    num_kept: int
    num_parts: int
    """Output files."""
    dropped: dict[str, int]
    """Rows by reason code."""
    evaluation_sets: dict[str, dict[str, int]]
    """For each evaluation set: its items, in which way they are searched for, the documents dropped for it, and how
    many items are in them. A document may be dropped for several sets.
    """
    examples: dict[str, list[dict[str, Any]]]
    """The first few rejects of each reason (contaminated: of each evaluation set), long texts truncated."""
    found_items: dict[str, list[int]] = field(default_factory=dict)
    """For each evaluation set: the items, counted from 1, of which documents hold a part. Of equal items, the first."""

    @staticmethod
    def path(output: Path) -> Path:
        """Where a finished run has its report."""
        return output / "report.json"

    @classmethod
    def read(cls, output: Path) -> "Report":
        """The report of a finished run."""
        return cls(**json.loads(cls.path(output).read_text(encoding="utf-8")))

    def write(self, output: Path) -> None:
        """Write report.md, then report.json, which says that the run is finished."""
        self.write_markdown(output)
        write_json(self.path(output), asdict(self))

    def write_markdown(self, output: Path) -> None:
        """Write only report.md."""
        with atomic_write(output / "report.md") as temporary:
            temporary.write_text(self.to_markdown(), encoding="utf-8")

    def summary(self) -> str:
        """One line for the terminal."""
        dropped = ", ".join(f"{reason}: {count:,}" for reason, count in self.dropped.items()) or "nothing"
        return (
            f"{counted(self.num_rows, 'row')}, {counted(self.num_kept, 'document')} kept in "
            f"{counted(self.num_parts, 'file')}; dropped {dropped}"
        )

    def to_markdown(self) -> str:
        """The report to read."""
        return "\n".join([*self._counts(), *self._sets(), *self._examples()]) + "\n"

    def _counts(self) -> Iterator[str]:
        yield f"# Corpus: {self.num_rows:,} rows of {self.num_sources:,} sources\n"
        share = {reason: [count, f"{count / self.num_rows:.2%}"] for reason, count in self.dropped.items()}
        kept = [self.num_kept, f"{self.num_kept / self.num_rows:.2%}"]
        yield from table(
            ["", "rows", "share"],
            [["kept", *kept], *([reason, *cells] for reason, cells in share.items()), ["all", self.num_rows, "100%"]],
        )

    def _sets(self) -> Iterator[str]:
        if self.evaluation_sets:
            yield "\n## Evaluation sets\n"
            yield "Items are searched for by their n-grams; shorter ones as one run of words; the shortest match only a"
            yield "document that holds nothing else; those without words are not searched for.\n"
            rows = [[name, *described.values()] for name, described in self.evaluation_sets.items()]
            heads = next(iter(self.evaluation_sets.values()))
            names = {"documents": "documents dropped"}
            yield from table(["", *(names.get(head, head.replace("_", " ")) for head in heads)], rows)
            yield ""
            for name, described in self.evaluation_sets.items():
                numbers = self.found_items.get(name, [])
                more = ", ..." if len(numbers) > _SHOWN_ITEMS else ""
                shown = f": {', '.join(map(str, numbers[:_SHOWN_ITEMS]))}{more}" if numbers else ""
                share = f"{len(numbers):,} of {described['items']:,} items"
                yield f"- {inline(name)}: {share} overlap the corpus as it was{shown}"

    def _examples(self) -> Iterator[str]:
        if self.examples:
            yield "\n## Examples"
        for group, examples in sorted(self.examples.items()):
            yield f"\n### {inline(group)}\n"
            for example in examples:
                evidence = "; ".join(f"{name}: {_line(value)}" for name, value in example["evidence"].items() if value)
                name = code(str(example["id"])) if example["id"] else "no id"
                yield f"- {name} ({inline(example['source'])}, row {example['row']:,}). {inline(evidence)}"
                if example["text"]:
                    yield f"  > {inline(_line(example['text']))}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else inline(str(cell)) for cell in row) + " |"


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_line(item)}" for name, item in value.items())
    return " ".join(str(value).split())
