"""The stages of cleaning a corpus. Each is a function that does one task and leaves its results in the work folder.

    scan      reads every document: bad records, overlap with evaluation sets, keys of exact duplicates, ids
    exact     compares those keys, one partition at a time
    minhash   reads what is left: keys of near-duplicates
    near      compares those keys; then one process joins the pairs to clusters
    write     reads again, and writes clean documents and rejects

A shard of the input is `rows_per_shard` rows of one source; it becomes one output file. Results have the name of their
shard or partition, appear whole or not at all, and depend on nothing but the input: it makes no difference which worker
does what, or how often a run was killed.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_tpt.corpus.decontamination import EvaluationIndex
from megatron_tpt.corpus.deduplication import document_number, text_key, write_keys, write_partition
from megatron_tpt.corpus.job import Description, PartitionTask, SourceTask, SourceTasks, write_json
from megatron_tpt.corpus.near_duplicates import MinHash
from megatron_tpt.corpus.verdicts import ShardTally, Verdicts
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write
from megatron_tpt.records import Record, Row, json_lines, write_records
from megatron_tpt.records.inventory import Entry

_MAX_BATCH_ROWS = 1000
_MAX_BATCH_CHARACTERS = 1 << 18
_CHANGED = "has changed while it was read; choose another --output"


def scan(tasks: SourceTasks) -> Iterator[int]:
    """Scan every document once. Leaves keys, ids and, last, a JSON file of counts and contaminated rows."""
    job = tasks[0].job
    index = EvaluationIndex.load(job.index_path) if job.options.decontaminate else None
    for task in tasks:
        yield from _scan(task, index)


def _scan(task: SourceTask, index: EvaluationIndex | None) -> Iterator[int]:
    job, options = task.job, task.job.options
    if task.stripe == 0:
        job.sources[task.source].require_content()
    for shard, rows in task.missing("scan", ".json"):
        contaminated: dict[str, Any] = {}
        items: dict[str, set[int]] = {}
        ids: dict[int, bytes] = {}
        keys: list[bytes] = []
        problems: Counter[str] = Counter()
        absent = set(options.meta_columns)
        num_rows = 0
        with job.examiner(shard) as examine:
            for batch in batches(rows):
                num_rows += len(batch)
                problems.update(str(row.problem) for row in batch if row.record is None)
                records = [(row.number, row.record) for row in batch if row.record is not None]
                found = index.find([record.text for _, record in records]) if index else [None] * len(records)
                clean: list[tuple[int, Record]] = []
                for (row, record), contamination in zip(records, found, strict=True):
                    absent -= record.meta.keys()
                    if contamination:
                        contaminated[str(row)] = contamination.to_dict()
                        for name, numbers in contamination.items.items():
                            items.setdefault(name, set()).update(numbers)
                        continue
                    clean.append((row, record))
                    if options.deduplicate != "none":
                        ids[row] = record.id.encode()
                        keys.append(text_key(record.text, options.ignore_case, options.ignore_whitespace))
                examine(clean)
        if options.deduplicate != "none":
            write_keys(job.path("scan", shard, ".keys.npy"), keys, (document_number(shard.source, row) for row in ids))
            _write_ids(job.path("scan", shard, ".ids.npy"), ids, options.rows_per_shard)
        write_json(
            job.path("scan", shard, ".json"),
            {
                "rows": num_rows,
                "problems": problems,
                "keys": len(keys),
                "contaminated": contaminated,
                "items": {name: sorted(numbers) for name, numbers in items.items()},
                "absent_columns": sorted(absent),
            },
        )
        yield num_rows
    if task.num_stripes == 1:
        write_json(job.scanned_path(task.source), {}, durable=False)


def batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows by the thousand, or fewer where they are long."""
    batch: list[Row] = []
    num_characters = 0
    for row in rows:
        batch.append(row)
        num_characters += len(row.record.text) if row.record else 0
        if len(batch) >= _MAX_BATCH_ROWS or num_characters >= _MAX_BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _write_ids(path: Path, ids: dict[int, bytes], rows_per_shard: int) -> None:
    """An array of ids by row within the shard, from which single ids can be read."""
    rows = {row % rows_per_shard: name for row, name in ids.items()}
    array = np.array([rows.get(row, b"") for row in range(max(rows, default=-1) + 1)], dtype=bytes)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def compare(task: PartitionTask) -> Iterator[int]:
    """Find the pairs of documents with an equal key in one partition."""
    files = task.job.pair_files(task.stage)
    keys_of = {"exact": "scan", "near": "minhash"}[task.stage]
    key_files = (task.job.path(keys_of, shard, ".keys.npy") for shard in task.job.shards())
    write_partition(files[task.number], key_files, task.number, len(files))
    yield 0


def minhash(tasks: SourceTasks) -> Iterator[int]:
    """Leave the MinHash keys of every document that is neither contaminated nor an exact duplicate."""
    job, options = tasks[0].job, tasks[0].job.options
    signature = MinHash(
        options.minhash_ngram,
        options.minhash_num_buckets,
        options.minhash_hashes_per_bucket,
        options.minhash_fold_numbers,
    )
    for shard, rows in (missing for task in tasks for missing in task.missing("minhash", ".keys.npy")):
        verdicts = Verdicts(job, shard, ["exact"])
        keys: list[bytes] = []
        documents: list[int] = []
        for row in rows:
            if row.record is not None and not verdicts.drops(row.number):
                row_keys = signature.keys(row.record.text)
                keys += row_keys
                documents += [document_number(shard.source, row.number)] * len(row_keys)
        write_keys(job.path("minhash", shard, ".keys.npy"), keys, documents)
        yield verdicts.num_rows


def write(tasks: SourceTasks) -> Iterator[int]:
    """Write clean documents and rejects. Leaves, last, a JSON file with the tally of the shard."""
    job = tasks[0].job
    for shard, rows in (missing for task in tasks for missing in task.missing("write", ".json")):
        verdicts = Verdicts(job, shard, job.duplicate_stages)
        tally, description = ShardTally(job, shard, verdicts), job.describe(shard, verdicts)
        part, rejects = (job.options.output / name for name in job.files_of(shard))
        part.unlink(missing_ok=True)  # of a job that has grown since: perhaps nothing is left of it
        rejects.unlink(missing_ok=True)
        num_rejects = verdicts.num_rows - verdicts.num_kept
        with json_lines(rejects) if num_rejects else nullcontext() as add_reject:
            kept = _kept_records(rows, tally, add_reject, description, job.sources[shard.source].name)
            if verdicts.num_kept:
                write_records(part, kept)
            else:
                deque(kept, maxlen=0)
        if tally.counts["kept"] != verdicts.num_kept or tally.counts.total() != verdicts.num_rows:
            raise UserError(f"{job.sources[shard.source].name}: {_CHANGED}")
        write_json(
            job.path("write", shard, ".json"),
            {
                "counts": tally.counts,
                "contaminated_by": tally.contaminated_by,
                "examples": tally.examples,
                **description.tallies(),
                "files": [asdict(Entry.of(job.options.output, name)) for name in job.files_of(shard)],
            },
        )
        yield verdicts.num_rows


def _kept_records(
    rows: Iterator[Row],
    tally: ShardTally,
    add_reject: Callable[[bytes], object] | None,
    description: Description,
    source: str,
) -> Iterator[Record]:
    for row in rows:
        reject = tally.reject(row)
        if reject is not None:
            if add_reject is None:
                raise UserError(f"{source}: {_CHANGED}")
            add_reject(orjson.dumps(reject))
        elif row.record is not None:
            record = row.record
            yield Record(record.id, record.text, record.thinking, description.meta(record))
