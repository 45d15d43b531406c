"""Cleaning a corpus: removes bad records, contaminated documents and duplicates, and accounts for every row.

    OUTPUT/prepare.json                    the settings, written first; a run with other settings is refused
    OUTPUT/part-00000.jsonl.zst            what is left of the first rows of the input, in its order
    OUTPUT/rejects/part-00000.jsonl.zst    what is not, and why
    OUTPUT/report.md, OUTPUT/report.json   the counts, which add up to the input; written last
    OUTPUT/.inventory/                     sizes and checksums of these files, see records/inventory.py
    OUTPUT/.work/                          results of the stages (see stages.py); of a finished job, what it needs to
                                           continue when files are added to its input

A shard of which nothing is left (nothing is rejected) has no file among the parts (the rejects). Contaminated documents
are dropped before duplicates are searched for, so that no clean document is dropped in favour of a contaminated one.
"""

import itertools
import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tpt.corpus import stages
from megatron_tpt.corpus.decontamination import EvaluationIndex
from megatron_tpt.corpus.deduplication import Pairs, write_clusters
from megatron_tpt.corpus.job import PartitionTask, PrepareJob, Shard, SourceTask, SourceTasks, write_json
from megatron_tpt.corpus.options import PrepareOptions
from megatron_tpt.corpus.report import Report
from megatron_tpt.corpus.verdicts import EXAMPLES_PER_REASON
from megatron_tpt.errors import UserError
from megatron_tpt.jobs.lock import exclusive
from megatron_tpt.jobs.progress import ProgressLine
from megatron_tpt.jobs.settings import (
    added_names,
    check_settings,
    describe_names,
    in_job_order,
    require_apart,
    write_settings,
)
from megatron_tpt.jobs.workers import Workers
from megatron_tpt.names import counted
from megatron_tpt.records import DAMAGED, Source, expand_sources, notes_of_columns_not_kept
from megatron_tpt.records.inventory import Entry, Inventory, inventory_path, size_of, write_inventory

logger = logging.getLogger(__name__)

_BYTES_PER_STRIPE = 4 << 20
_WRITER = "prepare"


def prepare(options: PrepareOptions) -> Report:
    """Do what `tools/prepare.py` does. Raises UserError for what the user can fix."""
    return run(options, PrepareJob.settings_name, PrepareJob)


def run(
    options: PrepareOptions, settings_name: str, make_job: Callable[[PrepareOptions, list[Source]], PrepareJob]
) -> Report:
    """Do a job that cleans a corpus and perhaps more (see `PrepareJob`), whose settings are in the file of that name.
    Raises UserError for what the user can fix."""
    sources = expand_sources(options.locations())
    require_apart(options.output, options.locations(), [source.path for source in sources if source.path])
    options.warn_of_unused()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with exclusive(options.output / ".lock", str(options.output), timeout_s=10):
            path = options.output / settings_name
            job = make_job(options, in_job_order(path, sources))
            settings = job.settings()
            check_settings(path, settings)
            added = added_names(path, settings)
            if not added and Report.path(options.output).exists() and not _has_damaged_files(options.output):
                logger.info(f"{options.output}: finished before; nothing to do")
                return job.report_type.read(options.output)
            index = _evaluation_index(job)  # first: a mistake in them leaves nothing that constrains the next run
            if added:
                logger.info(f"{options.output}: the input has grown, {describe_names(added, 'added')}")
                _forget_other_additions(job, settings["input"][-len(added) :])
            else:
                write_settings(path, settings)
            if not job.index_path.exists():
                index.save(job.index_path)
            with Workers(options.worker_count) as workers:
                job = _scan(job, workers, can_forget=not added)
                if added:  # not earlier: with files that cannot be read the job stays as it was
                    _reopen(job)
                    write_settings(path, settings)
                _compare(job, workers)
                job = job.enrich(workers)
                _forget_damaged(job)
                over_sources(job, workers, "write", ".json", stages.write)
            report = job.extend_report(_collect(job, index))
            report.write(options.output)
            _tidy(job)
    except OSError as error:
        raise UserError(f"{error.filename or options.output}: {error.strerror or error}") from error
    logger.info(report.summary())
    return report


def _has_damaged_files(output: Path) -> bool:
    """Whether files of a finished job are not as they were recorded: then it is no longer finished."""
    damaged = list(Inventory(output).differences())
    for name, difference in damaged:
        logger.warning(f"{output / name}: {difference}; it is written again")
    if damaged:
        _forget_report(output)
    return bool(damaged)


def _forget_report(output: Path) -> None:
    """Make a job one that has not finished."""
    for path in (output / "report.md", Report.path(output), inventory_path(output, _WRITER)):
        path.unlink(missing_ok=True)


def _evaluation_index(job: PrepareJob) -> EvaluationIndex:
    """The index of a killed run, even where a data set of the Hub has changed since; else one of the sets as they
    are."""
    if job.index_path.exists():
        return EvaluationIndex.load(job.index_path)
    return EvaluationIndex.build(job.options.evaluation_sets(), job.options.ngram, job.options.min_matches)


def _scan(job: PrepareJob, workers: Workers, can_forget: bool) -> PrepareJob:
    """Scan all documents; returns the job with what is known then. What cannot be read leaves no job behind where
    `can_forget`."""
    try:
        over_sources(job, workers, "scan", ".json", stages.scan)
    except UserError:
        if can_forget and not any((job.work / "scan").rglob("*.json")):
            forget(job)
        raise
    for source in range(len(job.sources)):
        if not job.scanned_path(source).exists():  # its stripes were scanned by several workers
            write_json(job.scanned_path(source), {})
    return _after_scan(job, can_forget)


def _compare(job: PrepareJob, workers: Workers) -> None:
    """Find duplicates; tasks that were done before are skipped."""
    if job.options.deduplicate != "none":
        _over_partitions(job, workers, "exact")
    if job.options.deduplicate == "minhash":
        num_distinct = job.num_keys - sum(len(Pairs(path)) for path in job.pair_files("exact"))
        job = replace(job, num_minhash_keys=num_distinct * job.options.minhash_num_buckets)
        over_sources(job, workers, "minhash", ".keys.npy", stages.minhash)
        _over_partitions(job, workers, "near")
        if not job.near_path.exists():
            write_clusters(job.near_path, job.pair_files("near"))


def _forget_damaged(job: PrepareJob) -> None:
    """Have the shards written again of which a file is not as it was recorded."""
    for shard in job.shards():
        path = job.path("write", shard, ".json")
        files = json.loads(path.read_bytes()).get("files", []) if path.exists() else []
        if any(Entry(**file).difference(size_of(job.options.output / file["name"])) for file in files):
            path.unlink()


def over_sources(
    job: PrepareJob, workers: Workers, stage: str, suffix: str, work: Callable[[SourceTasks], Iterator[int]]
) -> None:
    """Do a stage that reads documents. Large sources are shared among the workers, small ones are done together."""
    num_workers = job.options.worker_count
    num_bytes = [source.num_bytes or 0 for source in job.sources]
    stripe_bytes = max(sum(num_bytes) / num_workers / 2, _BYTES_PER_STRIPE)
    tasks: list[SourceTask] = []
    for source in sorted(range(len(job.sources)), key=lambda i: -num_bytes[i]):
        if not _is_done(job, stage, suffix, source):
            num_stripes = max(1, min(num_workers, math.ceil(num_bytes[source] / stripe_bytes)))
            tasks += [SourceTask(job, source, stripe, num_stripes) for stripe in range(num_stripes)]
    most_tasks = math.ceil(len(tasks) / num_workers / 4)
    _run(stage, workers, work, _batches(tasks, num_bytes, stripe_bytes, most_tasks))


def _run[T](stage: str, workers: Workers, work: Callable[[T], Iterator[int]], tasks: Sequence[T]) -> None:
    """Do the tasks of a stage, and report its progress."""
    num_done = 0

    def summary() -> str:
        rows = f"{num_done:,} rows, {num_done / line.elapsed_s:,.0f} rows/s, " if num_done else ""
        return f"{stage}: {rows}{line.elapsed_s:,.1f} s"

    with ProgressLine() as line:
        for num_rows in workers.run(work, tasks):
            num_done += num_rows
            line.show(summary)
    logger.info(summary())


def _batches(
    tasks: Sequence[SourceTask], num_bytes: Sequence[int], max_bytes: float, max_tasks: int
) -> list[SourceTasks]:
    """The tasks in order, small ones in batches of at most `max_bytes` (`num_bytes` is by source)."""
    batches: list[list[SourceTask]] = []
    size = 0.0
    for task in tasks:
        share = num_bytes[task.source] / task.num_stripes
        if not batches or size + share > max_bytes or len(batches[-1]) >= max_tasks:
            batches.append([])
            size = 0.0
        batches[-1].append(task)
        size += share
    return [SourceTasks(batch) for batch in batches]


def _is_done(job: PrepareJob, stage: str, suffix: str, source: int) -> bool:
    if not job.num_shards:
        return job.scanned_path(source).exists()
    return all(job.path(stage, Shard(source, i), suffix).exists() for i in range(job.num_shards[source]))


def _over_partitions(job: PrepareJob, workers: Workers, stage: str) -> None:
    """Do a stage that compares keys."""
    tasks = [PartitionTask(job, stage, i) for i, path in enumerate(job.pair_files(stage)) if not path.exists()]
    _run(stage, workers, stages.compare, tasks)


def _after_scan(job: PrepareJob, can_forget: bool) -> PrepareJob:
    """The job with what is known after the scan. Reports sources and columns without any result."""
    num_shards: list[int] = []
    num_rows = num_keys = 0
    problems: Counter[str] = Counter()
    absent: set[str] | None = None
    for source in range(len(job.sources)):
        scanned = list(_scanned(job, source))
        num_shards.append(len(scanned))
        num_keys += sum(shard["keys"] for shard in scanned)
        rows_here = sum(shard["rows"] for shard in scanned)
        problems_here = sum((Counter(shard["problems"]) for shard in scanned), Counter[str]())
        _say_of_source(job.sources[source].name, rows_here, problems_here)
        num_rows += rows_here
        problems += problems_here
        for shard in scanned:  # earlier versions did not look
            absent_here = set(shard.get("absent_columns", []))
            absent = absent_here if absent is None else absent & absent_here
    if problems.total() == num_rows:
        if can_forget:
            forget(job)
        raise UserError(
            f"the input holds no document ({_counts(problems) or 'it is empty'}); {_advice(problems, job.options)}"
        )
    for name in sorted(absent or ()):
        logger.warning(f"--meta-columns {name}: no document has such a column")
    for columns, own in itertools.groupby(enumerate(job.sources), key=lambda one: job.columns_of(one[0])):
        for note in notes_of_columns_not_kept([source for _, source in own], columns):
            logger.info(f"note: {note}")
    return replace(job, num_shards=tuple(num_shards), num_keys=num_keys)


def _scanned(job: PrepareJob, source: int) -> Iterator[dict[str, Any]]:
    """What the scan found in each shard of a source."""
    for number in itertools.count():
        path = job.path("scan", Shard(source, number), ".json")
        if not path.exists():
            return
        yield (scanned := json.loads(path.read_bytes()))
        if DAMAGED in scanned["problems"]:  # what a worker could read beyond the damage depends on where it began
            return


def _say_of_source(name: str, num_rows: int, problems: Counter[str]) -> None:
    """Report what is lost of a source as a whole."""
    if DAMAGED in problems:
        logger.warning(f"{name}: damaged after {counted(num_rows - 1, 'row')}; what follows is not read")
    elif num_rows == 0:
        logger.warning(f"{name}: holds no rows")
    elif problems.total() == num_rows:
        logger.warning(f"{name}: none of its {num_rows:,} rows is a document ({_counts(problems)})")


def _advice(problems: Counter[str], options: PrepareOptions) -> str:
    """What to change where no row is a document."""
    blamed = {name for name in options.meta_columns if any(each.startswith(f"column {name!r} ") for each in problems)}
    if blamed:
        return f"omit {', '.join(sorted(blamed))} from --meta-columns"
    if any("text" in problem or "column" in problem for problem in problems):
        return "is --text-column right?"
    return "fix these files or name others with --input"


def _counts(problems: Counter[str]) -> str:
    return ", ".join(f"{problem}: {count:,}" for problem, count in problems.items())


def _forget_other_additions(job: PrepareJob, entries: list[dict[str, Any]]) -> None:
    """Keep what was scanned of the files that are being added, and nothing of others that were to be added."""
    note = job.work / "added.json"
    if note.exists() and json.loads(note.read_bytes()) == entries:
        return
    for source in range(len(job.sources) - len(entries), len(job.sources)):
        shutil.rmtree(job.path("scan", Shard(source, 0), "").parent, ignore_errors=True)
        job.scanned_path(source).unlink(missing_ok=True)
    write_json(note, entries)


def _reopen(job: PrepareJob) -> None:
    """Make the job one that has not finished, with all that files after those that it has cannot change."""
    _forget_report(job.options.output)
    job.near_path.unlink(missing_ok=True)
    for stage in job.outdated_by_growth:
        shutil.rmtree(job.work / stage, ignore_errors=True)


def _tidy(job: PrepareJob) -> None:
    """Keep what a job with more input needs of this one: keys, ids and counts of its documents."""
    for folder in job.work.iterdir():
        if folder.is_dir() and folder.name not in job.stages_kept:
            shutil.rmtree(folder, ignore_errors=True)
    for path in (job.index_path, job.near_path, job.work / "added.json"):
        path.unlink(missing_ok=True)


def forget(job: PrepareJob) -> None:
    """Leave the output as if this run had never started, so that it can be started with other settings."""
    shutil.rmtree(job.work, ignore_errors=True)
    job.settings_path.unlink(missing_ok=True)


def _collect(job: PrepareJob, index: EvaluationIndex) -> Report:
    """Add up the tallies of all shards."""
    counts: Counter[str] = Counter()
    contaminated_by: Counter[str] = Counter()
    examples: dict[str, list[dict[str, Any]]] = {}
    files: list[dict[str, Any]] = []
    items: dict[str, set[int]] = {}
    num_parts = num_rows = 0
    for shard in job.shards():
        scanned = json.loads(job.path("scan", shard, ".json").read_bytes())
        num_rows += scanned["rows"]
        for name, numbers in scanned.get("items", {}).items():  # earlier versions did not record them
            items.setdefault(name, set()).update(numbers)
        tally = json.loads(job.path("write", shard, ".json").read_bytes())
        counts.update(tally["counts"])
        contaminated_by.update(tally["contaminated_by"])
        files += tally.get("files", [])  # earlier versions did not record them
        num_parts += "kept" in tally["counts"]
        for group, found in tally["examples"].items():
            examples[group] = (examples.get(group, []) + found)[:EXAMPLES_PER_REASON]
    num_kept = counts.pop("kept", 0)
    assert num_kept + counts.total() == num_rows, "documents were lost"
    sets = {
        name: described | {"documents": contaminated_by[name], "items_found": len(items.get(name, ()))}
        for name, described in index.describe().items()
    }
    write_inventory(job.options.output, _WRITER, (file for file in files if file["bytes"] is not None))
    found = {name: sorted(numbers) for name, numbers in items.items()}
    report = Report(
        len(job.sources), num_rows, num_kept, num_parts, dict(sorted(counts.items())), sets, examples, found
    )
    if num_kept == 0:
        report.write_markdown(job.options.output)
        raise UserError(
            f"{job.options.output}: no document is left ({report.summary()}); report.md and rejects/ say why; choose "
            "other options and another --output"
        )
    return report
