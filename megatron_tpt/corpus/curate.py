"""Curating a corpus: what tools/prepare.py does, and between finding duplicates and writing: annotations, and strata.

    OUTPUT/curate.json                     the settings, written first; a run with other settings is refused
    OUTPUT/part-00000.jsonl.zst            the documents that are kept; meta has their data sets, annotations, strata
    OUTPUT/rejects/, report.md, report.json, .inventory/, .work/    as of prepare.py

    .work/scan/          also what fast annotators found of documents, see findings.py
    .work/datasets/      which data sets hold a document, see origins.py
    .work/judge/         what the language model answered, by shard
    .work/annotate/      what other annotators found of those that are kept; for each of these its bits (the strata
                         whose own condition it meets), the hash of its text, its tokens

Lengths, domain and reasoning intensity are found while the input is scanned, so that it is read no more often than by
prepare.py; other annotators and judges see documents that are kept alone. Results have the name of their shard, appear
whole or not at all, and depend on nothing but the input (and on the language model): it makes no difference how often a
run was killed.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np

from megatron_tpt.corpus import stages
from megatron_tpt.corpus.annotate.judge import Judge
from megatron_tpt.corpus.curate_options import CurateOptions, Dataset
from megatron_tpt.corpus.curate_report import CuratedMeta, CurateReport, extended_report, int_of
from megatron_tpt.corpus.deduplication import Pairs, document_number
from megatron_tpt.corpus.documents import Composer
from megatron_tpt.corpus.findings import Finding, find, load_annotators, read_findings, to_line
from megatron_tpt.corpus.job import Description, PrepareJob, Shard, SourceTask, SourceTasks, write_json
from megatron_tpt.corpus.judging import JUDGE, judge_documents, judgements
from megatron_tpt.corpus.options import PrepareOptions
from megatron_tpt.corpus.origins import names_of, read_origins, write_origins
from megatron_tpt.corpus.prepare import forget, over_sources, run
from megatron_tpt.corpus.report import Report
from megatron_tpt.corpus.strata import Strata, with_limits
from megatron_tpt.corpus.verdicts import Verdicts
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write, file_fingerprint
from megatron_tpt.generation import check_model
from megatron_tpt.indexing.chat_shapes import ChatColumns
from megatron_tpt.indexing.tokenizer import tokenizer_fingerprint
from megatron_tpt.jobs.workers import Workers
from megatron_tpt.records import Columns, Record, Row, Source, expand_sources, json_lines

logger = logging.getLogger(__name__)

DATASETS, ANNOTATE = "datasets", "annotate"
FOUND, COUNTED = ".found.jsonl.zst", ".counted.npy"
_NOT_SETTINGS = ("model", "engine", "endpoints", "api", "max_model_len", "tensor_parallel_size")
"""Options that a job may be continued with others of; of those for judges see `CurateJob.settings`."""


def curate(options: CurateOptions) -> CurateReport:
    """Do what `tools/curate.py` does. Raises UserError for what the user can fix."""
    load_annotators(options)  # first, as what cannot be loaded must not leave a job behind
    if options.judges() and options.engine != "endpoint":
        check_model(options.engine_options().model)
    make_job = functools.partial(_make_job, datasets=_datasets_of(options))
    return cast(CurateReport, run(options, CurateJob.settings_name, make_job))


def _make_job(options: PrepareOptions, sources: list[Source], datasets: dict[str, int]) -> "CurateJob":
    assert isinstance(options, CurateOptions)
    strata = Strata.read(options.strata) if options.strata is not None else None
    return CurateJob(options, sources, strata=strata, dataset_of=tuple(datasets[source.name] for source in sources))


def _datasets_of(options: CurateOptions) -> dict[str, int]:
    """Which entry of the input each source belongs to. Raises UserError for one that belongs to several."""
    found: dict[str, int] = {}
    for number, dataset in enumerate(options.datasets()):
        for source in expand_sources([dataset.location]):
            if found.setdefault(source.name, number) != number:
                other = options.datasets()[found[source.name]]
                raise UserError(
                    f"--input: {source.name} belongs to {other.name}={other.location} and to {dataset.name}="
                    f"{dataset.location}; name it once"
                )
    return found


@dataclass(frozen=True)
class CurateJob(PrepareJob):
    """A job that also annotates documents and makes strata of them."""

    settings_name: ClassVar[str] = "curate.json"
    report_type: ClassVar[type[Report]] = CurateReport
    stages_kept: ClassVar[tuple[str, ...]] = ("scan", "write", JUDGE)

    strata: Strata | None = None
    """With limits once these are known."""
    notes: tuple[str, ...] = ()
    """What is probably a mistake in the sizes of strata."""
    dataset_of: tuple[int, ...] = ()
    """Of each source the entry of the input."""

    @property
    def curate_options(self) -> CurateOptions:
        """The options, by their type."""
        assert isinstance(self.options, CurateOptions)
        return self.options

    @functools.cached_property
    def entries(self) -> list[Dataset]:
        """The entries of the input; to tell files from columns, reading them looks at the disk."""
        return self.curate_options.datasets()

    @functools.cached_property
    def dataset_names(self) -> list[str]:
        """The names of the data sets, each once, in the order of the input."""
        return list(dict.fromkeys(dataset.name for dataset in self.entries))

    @functools.cached_property
    def dataset_bits(self) -> np.ndarray:
        """The bit of each source's data set: uint64 [sources]."""
        places = (self.dataset_names.index(self.entries[number].name) for number in self.dataset_of)
        return np.array([1 << place for place in places], np.uint64)

    def dataset_name(self, source: int) -> str:
        """The data set of a source."""
        return self.entries[self.dataset_of[source]].name

    def columns_of(self, source: int) -> Columns:
        """See `PrepareJob.columns_of`."""
        options, entry = self.curate_options, self.entries[self.dataset_of[source]]
        names = entry.column_names or (options.text_column,)
        return Columns(
            ",".join(names),
            options.id_column,
            tuple(options.meta_columns),
            Composer(entry.has_thoughts, frozenset(options.ignore_fields)),
            ChatColumns().extra if len(names) == 1 else (),  # of a conversation, which is in one column
        )

    def settings(self) -> dict[str, Any]:
        """See `PrepareJob.settings`."""
        options = self.curate_options
        settings = {name: value for name, value in super().settings().items() if name not in _NOT_SETTINGS}
        for source, entry in enumerate(settings["input"]):
            dataset = self.entries[self.dataset_of[source]]
            entry["fingerprint"] = f"{dataset.name}:{','.join(dataset.columns or ())}:{entry['fingerprint']}"
        judges = {name: asdict(Judge.read(str(path))) for name, path in options.judges()}
        return settings | {
            "datasets": self.dataset_names,
            "tokenizer": tokenizer_fingerprint(options.tokenizer) if options.tokenizer else None,
            "classify": {name: _fingerprints(path) for name, path in options.classifiers()},
            "judge": judges,
            "model": options.model,
            "api": options.api if judges and options.engine == "endpoint" else None,
            "strata": self.strata.to_dict() if self.strata else None,
        }

    @property
    def outdated_by_growth(self) -> list[str]:
        """See `PrepareJob.outdated_by_growth`: a new document may be in a data set more, and sizes of strata change."""
        return ["exact", "near", DATASETS, ANNOTATE, "write"]

    def enrich(self, workers: Workers) -> Self:
        """Find data sets, judge, annotate, and size the strata."""
        if len(self.dataset_names) > 1:
            near = Pairs(self.near_path) if "near" in self.duplicate_stages else None
            for path, pairs in zip(self.origin_paths(), self._pairs(), strict=True):
                if not path.exists():
                    write_origins(path, Pairs(pairs), near, self.dataset_bits)
        if self.curate_options.judges():
            judge_documents(self, self.curate_options)
        if self.strata is not None or not all(map(self.is_annotated, self.shards())):
            over_sources(self, workers, ANNOTATE, COUNTED, annotate)
        return self._with_limits()

    def _pairs(self) -> list[Path]:
        """All files of pairs of duplicates."""
        files = {"exact": self.pair_files("exact"), "near": [self.near_path]}
        return [path for stage in self.duplicate_stages for path in files[stage]]

    def origin_paths(self) -> list[Path]:
        """What the files of pairs say of data sets."""
        return [self.work / DATASETS / f"{path.stem}.pairs" for path in self._pairs()]

    def findings_path(self, shard: Shard) -> Path:
        """What was found of the documents of a shard: in the scan, or of those that are kept."""
        in_scan = self.path("scan", shard, FOUND)
        return in_scan if in_scan.exists() else self.path(ANNOTATE, shard, FOUND)

    def is_annotated(self, shard: Shard) -> bool:
        """Whether the documents of a shard are annotated."""
        return self.findings_path(shard).exists()

    @functools.cached_property
    def fields_of_strata(self) -> frozenset[str]:
        """The fields of a document's own `meta` that decide its strata, or which data sets are named."""
        wheres = self.strata.wheres.values() if self.strata is not None else ()
        return frozenset(["datasets", "tokens", *(name.partition(".")[0] for one in wheres for name in one.fields)])

    @contextmanager
    def examiner(self, shard: Shard) -> Iterator[Callable[[Sequence[tuple[int, Record]]], object]]:
        """See `PrepareJob.examiner`."""
        if not self.curate_options.annotates_in_scan:
            yield lambda documents: None
            return
        with json_lines(self.path("scan", shard, FOUND)) as add:
            yield lambda documents: add(to_line(find(self, documents)))

    def _with_limits(self) -> Self:
        if self.strata is None:
            return self
        try:
            strata, notes = with_limits(self.strata, self.counted)
        except UserError:
            forget(self)
            raise
        return replace(self, strata=strata, notes=tuple(notes))

    def notes_path(self, shard: Shard) -> Path:
        """What the conditions of strata noted, up to this shard, of fields and kinds of values."""
        return self.path(ANNOTATE, shard, ".json")

    def counted(self) -> Iterator[np.ndarray]:
        """Of the documents of each shard that are kept: bits, hash, tokens; uint64 [3, documents]."""
        return (np.load(self.path(ANNOTATE, shard, COUNTED), allow_pickle=False) for shard in self.shards())

    def describe(self, shard: Shard, verdicts: Verdicts) -> Description:
        """See `PrepareJob.describe`."""
        fields = map(_fields_maker(self, shard), _kept(self, shard, verdicts))
        members: dict[str, np.ndarray] | None = None
        if self.strata is not None:
            bits, hashes, _ = np.load(self.path(ANNOTATE, shard, COUNTED), allow_pickle=False)
            members = self.strata.members(bits, hashes)
        return CuratedMeta(self, shard, verdicts, fields, members)

    def extend_report(self, report: Report) -> Report:
        """See `PrepareJob.extend_report`."""
        return extended_report(self, report)


def _fingerprints(path: Path) -> dict[str, str]:
    """Of a model in a file or in a folder."""
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file())
    return {file.name: str(file_fingerprint(file)) for file in files}


def annotate(tasks: SourceTasks) -> Iterator[int]:
    """Annotate the documents that are kept, unless that was done in the scan. Leaves, last, an array of what strata
    need of them."""
    job = tasks[0].job
    assert isinstance(job, CurateJob)
    for shard, rows in (part for task in tasks for part in _unfinished(job, task)):
        verdicts = Verdicts(job, shard, job.duplicate_stages)
        if rows is not None:
            with json_lines(job.path(ANNOTATE, shard, FOUND)) as add:
                kept = (row for row in rows if row.record is not None and not verdicts.drops(row.number))
                for batch in stages.batches(kept):
                    add(to_line(find(job, [(row.number, cast(Record, row.record)) for row in batch])))
        fields_of = _fields_maker(job, shard)
        counted = [_counted(job, shard, one, fields_of(one)) for one in _kept(job, shard, verdicts)]
        wheres = job.strata.wheres if job.strata is not None else {}
        write_json(job.notes_path(shard), {name: [sorted(one.unseen), one.mismatches] for name, one in wheres.items()})
        with atomic_write(job.path(ANNOTATE, shard, COUNTED)) as temporary, temporary.open("wb") as file:
            np.save(file, np.array(counted, np.uint64).reshape(-1, 3).T)
        yield verdicts.num_rows


def _unfinished(job: CurateJob, task: SourceTask) -> Iterator[tuple[Shard, Iterator[Row] | None]]:
    """The shards of a task that are not finished, with their rows where these must be read."""
    shards = list(task.unfinished(ANNOTATE, COUNTED))
    if all(job.is_annotated(shard) for shard in shards):
        yield from ((shard, None) for shard in shards)
    else:
        yield from task.missing(ANNOTATE, COUNTED)


def _kept(job: CurateJob, shard: Shard, verdicts: Verdicts) -> Iterator[Finding]:
    """What was found of the documents of a shard that are kept."""
    return (one for one in read_findings(job.findings_path(shard)) if not verdicts.drops(one.row))


def _fields_maker(job: CurateJob, shard: Shard) -> Callable[[Finding], dict[str, Any]]:
    """Makes the fields of `meta` that this job writes, but for the strata."""
    own, names = int(job.dataset_bits[shard.source]), job.dataset_names
    begin = document_number(shard.source, shard.number * job.options.rows_per_shard)
    others = read_origins(job.origin_paths(), begin, begin + job.options.rows_per_shard) if len(names) > 1 else {}
    answers = judgements(job, shard) if job.curate_options.judges() else {}
    names_by_bits = functools.cache(lambda bits: list(names_of(bits, names)))

    def fields_of(one: Finding) -> dict[str, Any]:
        datasets = names_by_bits(own | others.get(document_number(shard.source, one.row), 0))
        if isinstance(before := one.meta.get("datasets"), list):  # which an earlier job found
            datasets = list(dict.fromkeys([*before, *datasets]))
        return {"datasets": datasets, **one.annotations, **answers.get(one.row, {})}

    return fields_of


def _counted(job: CurateJob, shard: Shard, one: Finding, fields: dict[str, Any]) -> tuple[int, int, int]:
    """Bits, hash, tokens of a document."""
    meta = {"source": job.sources[shard.source].name, **one.meta, **fields}
    bits = job.strata.bits(meta) if job.strata is not None else 0
    return bits, one.digest, max(0, int_of(meta, "tokens"))
