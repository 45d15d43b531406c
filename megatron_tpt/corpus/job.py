"""What the stages of cleaning a corpus work on: the job, its shards, and the tasks it is cut into."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import orjson

from megatron_tpt.corpus.deduplication import num_partitions
from megatron_tpt.corpus.options import PrepareOptions
from megatron_tpt.corpus.report import Report
from megatron_tpt.corpus.settings import make_settings
from megatron_tpt.files import atomic_write
from megatron_tpt.names import counted
from megatron_tpt.records import REJECTS, Columns, Record, Row, Source, read_blocks

if TYPE_CHECKING:
    from megatron_tpt.corpus.verdicts import Verdicts
    from megatron_tpt.jobs.workers import Workers


class Shard(NamedTuple):
    """Rows of one source."""

    source: int
    number: int

    def __str__(self) -> str:
        return f"{self.source:06d}/{self.number:06d}"


@dataclass(frozen=True)
class PrepareJob:
    """What all tasks of a run know. A job that does more than cleaning overrides its methods."""

    settings_name: ClassVar[str] = "prepare.json"
    report_type: ClassVar[type[Report]] = Report
    stages_kept: ClassVar[tuple[str, ...]] = ("scan", "write")
    """The stages whose results a finished job keeps, for when its input grows."""

    options: PrepareOptions
    sources: list[Source]
    num_shards: tuple[int, ...] = ()
    """Of each source; known after the scan."""
    num_keys: int = 0
    """Documents that are compared for exact duplicates; known after the scan."""
    num_minhash_keys: int = 0
    """Known after the exact stage."""

    @property
    def settings_path(self) -> Path:
        """Where the settings of the run are."""
        return self.options.output / self.settings_name

    def settings(self) -> dict[str, Any]:
        """Everything that decides what the output holds."""
        return make_settings(self.options, self.settings_path, self.sources)

    def columns_of(self, source: int) -> Columns:
        """Which columns of a source make a record."""
        return Columns(self.options.text_column, self.options.id_column, tuple(self.options.meta_columns))

    @property
    def outdated_by_growth(self) -> list[str]:
        """The stages whose results do not hold when files are added to the input.

        A document is an exact duplicate of an earlier one only, but a new one can join near-duplicates that had nothing
        in common: then all documents are compared again.
        """
        return ["exact", "near"] + ["write"] * (self.options.deduplicate == "minhash")

    @property
    def duplicate_stages(self) -> list[str]:
        """The stages that find duplicates."""
        return {"none": [], "exact": ["exact"], "minhash": ["exact", "near"]}[self.options.deduplicate]

    @contextmanager
    def examiner(self, shard: Shard) -> Iterator[Callable[[Sequence[tuple[int, Record]]], object]]:
        """Yields what looks at the documents of a shard while it is scanned, contaminated ones excepted: it is given
        batches of (row, record)."""
        yield lambda documents: None

    def enrich(self, workers: "Workers") -> Self:
        """Whatever is done once duplicates are known and before documents are written; returns the job with what is
        known then."""
        return self

    def describe(self, shard: Shard, verdicts: "Verdicts") -> "Description":
        """What describes the documents of a shard that are kept."""
        return Description(self.sources[shard.source].name)

    def extend_report(self, report: Report) -> Report:
        """The report with what this job adds to it."""
        return report

    @property
    def work(self) -> Path:
        """The hidden folder with the results of the stages."""
        return self.options.output / ".work"

    @property
    def index_path(self) -> Path:
        """The index of the evaluation sets."""
        return self.work / "evaluation_index.npz"

    @property
    def near_path(self) -> Path:
        """The pairs of near-duplicates."""
        return self.work / "near.pairs"

    def scanned_path(self, source: int) -> Path:
        """Says that all of a source was scanned."""
        return self.work / "scan" / f"{source:06d}.done"

    def path(self, stage: str, shard: Shard, suffix: str) -> Path:
        """The result of a shard in a stage."""
        return self.work / stage / f"{shard}{suffix}"

    def files_of(self, shard: Shard) -> tuple[str, str]:
        """What a shard becomes in the output, documents and rejects: parts are numbered through all sources."""
        name = f"part-{self._first_parts[shard.source] + shard.number:05d}.jsonl.zst"
        return name, f"{REJECTS}/{name}"

    @cached_property
    def _first_parts(self) -> list[int]:
        """The number of the first part of each source."""
        return [0, *accumulate(self.num_shards)]

    def shards(self) -> Iterator[Shard]:
        """All shards in input order."""
        for source, num_shards in enumerate(self.num_shards):
            yield from (Shard(source, number) for number in range(num_shards))

    def pair_files(self, stage: str) -> list[Path]:
        """The results of the stages "exact" and "near"."""
        num_keys = {"exact": self.num_keys, "near": self.num_minhash_keys}[stage]
        partitions = num_partitions(num_keys) if num_keys else 0
        return [self.work / stage / f"{i:06d}-of-{partitions:06d}.pairs" for i in range(partitions)]


def meta_with_source(record: Record, source_name: str) -> dict[str, Any]:
    """The `meta` of a document that names its source; where it does so already, as it is."""
    return {"source": source_name} | record.meta


class Description:
    """Makes the `meta` of the documents of a shard that are kept, which it is asked for in their order."""

    def __init__(self, source_name: str) -> None:
        self._source_name = source_name

    def meta(self, record: Record) -> dict[str, Any]:
        """What the `meta` of the next document becomes."""
        return meta_with_source(record, self._source_name)

    def tallies(self) -> dict[str, Any]:
        """What it counted, for the report: JSON."""
        return {}


@dataclass(frozen=True)
class SourceTask:
    """Every `num_stripes`-th shard of one source, from number `stripe` on."""

    job: PrepareJob
    source: int
    stripe: int
    num_stripes: int

    def __str__(self) -> str:
        share = f" (share {self.stripe + 1} of {self.num_stripes})" if self.num_stripes > 1 else ""
        return self.job.sources[self.source].name + share

    def unfinished(self, stage: str, suffix: str) -> Iterator[Shard]:
        """The shards of this task whose result in `stage` is not there yet. After the scan."""
        for number in range(self.stripe, self.job.num_shards[self.source], self.num_stripes):
            shard = Shard(self.source, number)
            if not self.job.path(stage, shard, suffix).exists():
                yield shard

    def missing(self, stage: str, suffix: str) -> Iterator[tuple[Shard, Iterator[Row]]]:
        """The same with their rows, also in the scan."""

        def is_wanted(number: int) -> bool:
            is_ours = number % self.num_stripes == self.stripe
            return is_ours and not self.job.path(stage, Shard(self.source, number), suffix).exists()

        source = self.job.sources[self.source]
        for number, rows in read_blocks(
            source, self.job.columns_of(self.source), self.job.options.rows_per_shard, is_wanted
        ):
            if self.job.num_shards and number >= self.job.num_shards[self.source]:
                return
            yield Shard(self.source, number), rows


class SourceTasks(tuple[SourceTask, ...]):
    """Tasks that one worker does one after the other: what they share is sent and loaded once."""

    def __str__(self) -> str:
        return str(self[0]) + (f" and {counted(len(self) - 1, 'more file')}" if len(self) > 1 else "")


@dataclass(frozen=True)
class PartitionTask:
    """One partition of the keys of the stage "exact" or "near"."""

    job: PrepareJob
    stage: str
    number: int

    def __str__(self) -> str:
        return f"partition {self.number} of {self.stage} keys"


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write a small result."""
    with atomic_write(path, durable=durable) as temporary:
        temporary.write_bytes(orjson.dumps(value))
