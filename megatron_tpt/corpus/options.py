"""The options of `tools/prepare.py`. Light to import: the help of the command line needs nothing else."""

import logging
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_tpt.config.fields import PositiveInt, check_bounds
from megatron_tpt.errors import UserError

logger = logging.getLogger(__name__)


class EvaluationSet(NamedTuple):
    """One `--decontaminate NAME=FILE[:COLUMN[,COLUMN]]`."""

    name: str
    location: str
    """What `expand_sources` reads: a file, folder, pattern, or data set of the Hub."""
    columns: tuple[str, ...]


@dataclass(frozen=True)
class PrepareOptions:
    """Which documents to clean, of what, and where to."""

    input: list[str]
    """Files (.jsonl, .ndjson, .json, each plain or as .gz, .zst, .bz2, .xz; .parquet; .arrow), folders of them,
    patterns ("data/*.parquet"), Hugging Face data sets (a local folder, or hf://owner/name). Their order decides which
    of several duplicates is the first.
    """
    output: Path
    """The folder to fill: part-*.jsonl.zst with the clean documents, rejects/ with all others, report.md,
    report.json.
    """
    text_column: str = "text"
    """The column with the document; several, as in "question,answer", are joined by a newline."""
    id_column: str = "id"
    """The column with the document's id; without a column "id" the id is made from the content."""
    meta_columns: list[str] = field(default_factory=list)
    """Other columns to keep in the record's `meta`."""
    deduplicate: Literal["exact", "minhash", "none"] = "exact"
    """exact: drop documents whose text occurred before. minhash: also drop those that are nearly the same as an
    earlier one (see the options --minhash-*). The first in input order is kept.
    """
    ignore_case: bool = False
    """Texts that differ only in upper and lower case are exact duplicates too."""
    ignore_whitespace: bool = False
    """Texts that differ only in the number and kind of spaces and newlines are exact duplicates too."""
    minhash_ngram: PositiveInt = 5
    """Near-duplicates are documents that share many runs of this many words (in lower case, without punctuation and
    accents).
    """
    minhash_num_buckets: PositiveInt = 14
    """Two documents are near-duplicates when all hashes of one bucket agree. With the default of 14 buckets of 8
    hashes that happens for 92% of the pairs that share 80% of their runs of words, for 56% of those that share 70%,
    for 5% of those that share 50%. More buckets find more and less similar pairs.
    """
    minhash_hashes_per_bucket: PositiveInt = 8
    """More hashes per bucket find fewer and more similar pairs. The similarity that is found half of the time is about
    (1 / buckets) ^ (1 / hashes): 0.72.
    """
    minhash_fold_numbers: bool = True
    """Take all numbers for the same, so that dates and counters do not hide a near-duplicate. With
    --no-minhash-fold-numbers exercises that differ only in their numbers are not duplicates.
    """
    decontaminate: list[str] = field(default_factory=list)
    """Evaluation sets, NAME=FILE[:COLUMN[,COLUMN]], such as gsm8k=test.jsonl:question (without a column: "text") or
    "mmlu=hf://cais/mmlu/all?split=test:question,choices". FILE is anything that --input takes; a column may hold text,
    numbers, lists or objects, and a.b is the field b in column a. Documents that share a run of words with an item are
    dropped.
    """
    ngram: PositiveInt = 13
    """The length of such a run, in words (in lower case, without punctuation). Items of 8 words or more that are
    shorter are searched for as a whole; still shorter ones match only a document that holds nothing else.
    """
    min_matches: PositiveInt = 1
    """Drop a document when it shares at least this many different runs of words with an evaluation set."""
    rows_per_shard: PositiveInt = 20_000
    """Rows of input per output file, which holds what is left of them."""
    num_workers: PositiveInt | None = None
    """Processes to use; by default one per core. The output is the same for any number."""

    def __post_init__(self) -> None:
        check_bounds(self)
        self.evaluation_sets()

    def locations(self) -> list[str]:
        """The files, folders, patterns and data sets of the input."""
        return self.input

    def warn_of_unused(self) -> None:
        """Say on stderr which options were given that have no effect without others."""
        defaults = {
            one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(self)
        }
        for needed, is_given, names in self.needs():
            for name in names:
                if not is_given and getattr(self, name) != defaults[name]:
                    logger.warning(f"--{name.replace('_', '-')} has no effect without {needed}")

    def needs(self) -> list[tuple[str, bool, Sequence[str]]]:
        """What some options need to have an effect, whether it is given, and which options these are."""
        of_minhash = [name for name in vars(self) if name.startswith("minhash_")]
        return [
            ("--deduplicate minhash", self.deduplicate == "minhash", of_minhash),
            ("--deduplicate exact or minhash", self.deduplicate != "none", ("ignore_case", "ignore_whitespace")),
            ("--decontaminate", bool(self.decontaminate), ("ngram", "min_matches")),
        ]

    @property
    def worker_count(self) -> int:
        """Processes to use."""
        return self.num_workers or len(os.sched_getaffinity(0))

    def evaluation_sets(self) -> list[EvaluationSet]:
        """What `decontaminate` asks for. Raises UserError for a form it cannot have."""
        sets: list[EvaluationSet] = []
        for text in self.decontaminate:
            name, equals, rest = text.partition("=")
            if not (name and equals and rest):
                raise UserError(f"--decontaminate {text}: give NAME=FILE or NAME=FILE:COLUMN")
            location, found = split_location(rest)
            columns = found or ("text",)
            if location in ("", "hf://") or not all(columns):
                raise UserError(f"--decontaminate {text}: a name is missing; give NAME=FILE:COLUMN,COLUMN")
            if any(name == other.name for other in sets):
                raise UserError(f"--decontaminate {text}: there is another evaluation set with the name {name}")
            sets.append(EvaluationSet(name, location, columns))
        return sets


def split_location(text: str) -> tuple[str, tuple[str, ...] | None]:
    """FILE and the columns of FILE[:COLUMN[,COLUMN]], None where it names none. Colons may be part of the file's name;
    that of hf:// is."""
    scheme = "hf://" if text.startswith("hf://") else ""
    rest = text.removeprefix(scheme)
    if Path(text).expanduser().exists() or ":" not in rest:
        return text, None
    splits = [(rest[:i], rest[i + 1 :]) for i, character in enumerate(rest) if character == ":"]
    existing = (split for split in reversed(splits) if not scheme and Path(split[0]).expanduser().exists())
    location, columns = next(existing, splits[-1])
    return scheme + location, tuple(name.strip() for name in columns.split(","))
