"""Records to `.bin/.idx` with their manifests: the job behind `tools/index.py`.

One thread reads blocks of rows, several parse, encode and assemble them, the main thread writes the results in order.
Only a few blocks are in flight at a time, so memory does not grow with the input. What is written, and how a killed
job is resumed, is in `output.py` and `journal.py`; whether it is the same job, in `index_job.py`.
"""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.blocks import End, read_source
from megatron_tpt.indexing.encoders import DisagreementError
from megatron_tpt.indexing.encoding import BlockEncoder
from megatron_tpt.indexing.groups import grouped
from megatron_tpt.indexing.index_job import IndexJob, manifest_name
from megatron_tpt.indexing.journal import Journal, clear_leftovers, working_folder
from megatron_tpt.indexing.manifest import Manifest, Source
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.output import Output, publish
from megatron_tpt.indexing.selection import NOT_SELECTED
from megatron_tpt.indexing.shard_sets import shard_prefix
from megatron_tpt.jobs.ordered_workers import map_in_threads
from megatron_tpt.jobs.progress import ProgressLine
from megatron_tpt.logs import print_result
from megatron_tpt.names import counted
from megatron_tpt.records import DAMAGED, Row, describe
from megatron_tpt.records import Source as Input
from megatron_tpt.units import num_bytes

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0
_MAX_BLOCK_BYTES = 4 << 20
_MIN_BLOCK_BYTES = 128 << 10
_BASE_BYTES = 320 << 20  # libraries, tokenizers and their caches
_BYTES_PER_BLOCK_BYTE = 16  # the block, its columns, its tokens in the types of encoder and index


def index(options: IndexOptions) -> Manifest:
    """Index `options.input` into `options.output`.{bin,idx,json} and return the manifest. See `index_shards`."""
    assert options.shard_size is None, "a set of shards has several manifests"
    return index_shards(options)[0]


def index_shards(options: IndexOptions) -> list[Manifest]:
    """Index `options.input` and return the manifests, one for each shard.

    When that very index is there already, it is left alone. Raises UserError for bad input, for an output of
    other settings or of another program, and when no document is left; then nothing new is written.
    """
    os.environ.setdefault("RAYON_NUM_THREADS", str(options.worker_count))  # the threads of both tokenizers
    job = IndexJob(options)
    if (finished := job.finished()) is not None:
        clear_leftovers(options.output)
        print_result(f"{options.output}: already done, {_summary(finished)}")
        return finished
    with working_folder(options.output) as folder:
        if (finished := job.finished()) is not None:  # by another process, just now
            return finished
        journal = job.journal(folder)
        start_s = time.monotonic()
        num_tokens = 0 if journal.is_complete else _build(job, folder, journal)
        for note in job.where.notes() if job.where is not None and num_tokens else ():
            logger.warning(f"--where {options.where!r}: {note}")
        manifests = _publish(job, folder)
    seconds = time.monotonic() - start_s
    print_result(f"{options.output}: {_summary(manifests)}; {num_tokens / seconds:,.0f} tokens/s in {seconds:.3f} s")
    return manifests


def _summary(manifests: Sequence[Manifest]) -> str:
    counts = [manifest.counts for manifest in manifests]
    documents, with_thinking, tokens, document_tokens, thinking_tokens = (
        sum(getattr(count, name) for count in counts)
        for name in ("documents", "documents_with_thinking", "tokens", "document_tokens", "thinking_tokens")
    )
    skipped = sum((Counter(count.skipped) for count in counts), Counter[str]())
    num_unselected = skipped.pop(NOT_SELECTED, 0)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
    return (
        f"{documents:,} documents ({with_thinking:,} with thinking), "
        f"{tokens:,} tokens ({document_tokens:,} document, {thinking_tokens:,} thinking)"
        + (f", {len(manifests)} shards" if len(manifests) > 1 else "")
        + (f", {counted(num_unselected, 'other')} {NOT_SELECTED}" if num_unselected else "")
        + (f", {counted(skipped.total(), 'bad record')} skipped ({reasons})" if skipped else "")
    )


def _build(job: IndexJob, folder: Path, journal: Journal) -> int:
    """Write all that is not yet written, and complete it. Returns how many tokens these were."""
    itemsize = numpy.dtype(job.template.dtype).itemsize
    inputs = job.inputs[len(journal.sources) :]
    output = Output(
        folder,
        journal,
        job.tokenizer.vocab_size,
        itemsize,
        has_sentences=job.options.sentences,
        shard_bytes=job.shard_bytes,
    )
    with output:
        num_tokens_before = output.num_tokens
        if inputs:
            try:
                _write(job, inputs, output)
            except DisagreementError:
                output.discard()  # only samples of what is written were compared
                raise
        num_tokens = output.num_tokens - num_tokens_before
        if output.num_documents == 0:
            output.discard()
            skipped = ", ".join(f"{reason}: {count}" for reason, count in output.skipped.items())
            raise UserError(f"the input holds no document to index ({skipped or 'its files are empty'})")
        output.finish(job.template)
    return num_tokens


def _publish(job: IndexJob, folder: Path) -> list[Manifest]:
    """Move what is complete to its names."""
    num_shards = len(Journal.read(folder).shards)
    prefix = job.options.output
    prefixes = [prefix]
    if job.shard_bytes is not None:
        prefixes = [shard_prefix(prefix, shard, num_shards) for shard in range(num_shards)]
    publish(folder, prefixes)
    return [Manifest.read(published) for published in prefixes]


def _write(job: IndexJob, inputs: Sequence[Input], output: Output) -> None:
    """Read, encode and write the inputs, all at the same time."""
    workers = job.options.worker_count
    memory = num_bytes("--max-memory", job.options.max_memory) - _BASE_BYTES
    block_bytes = memory // (_BYTES_PER_BLOCK_BYTE * (2 * workers + 2))
    block_bytes = max(_MIN_BLOCK_BYTES, min(_MAX_BLOCK_BYTES, block_bytes))
    blocks = (block for input in inputs for block in read_source(input, job.columns, block_bytes))
    remaining, num_tokens_before = iter(inputs), output.num_tokens
    input, num_rows = next(remaining), 0
    with (
        ProgressLine(_LOG_EVERY_S) as line,
        closing(_ahead(grouped(blocks), 2)) as read,
        closing(map_in_threads(BlockEncoder(job).encode, read, workers)) as results,
    ):
        for result in chain.from_iterable(results):
            if isinstance(result, End):
                if result.damage is not None:
                    raise UserError(describe(input, Row(num_rows, None, DAMAGED, result.damage)))
                input.require_content(result.checksum)
                if not num_rows:
                    logger.warning(f"{input.name}: holds no rows")
                output.end_source(_manifest_source(input, result.checksum))
                input, num_rows = next(remaining, input), 0
                continue
            if result.problem is not None:
                raise UserError(describe(input, result.problem._replace(number=num_rows + result.problem.number)))
            output.add(result.documents, result.skipped)
            num_rows += result.num_rows
            line.show(lambda: _progress(output, num_tokens_before, line.elapsed_s))


def _progress(output: Output, num_tokens_before: int, seconds: float) -> str:
    rate = (output.num_tokens - num_tokens_before) / seconds
    return f"{output.num_documents:,} documents, {output.num_tokens:,} tokens, {rate:,.0f} tokens/s"


def _manifest_source(input: Input, checksum: str) -> Source:
    if input.path is None:
        return Source(input.name, 0, 0, 0, "")
    status = input.path.stat()
    return Source(manifest_name(input), 0, status.st_size, status.st_mtime_ns, checksum)


def _ahead[T](items: Iterator[T], depth: int) -> Generator[T]:
    """`items`, produced in their own thread, `depth` of them ahead of the consumer."""
    end: Any = object()
    with ThreadPoolExecutor(1) as executor:
        pending = deque(executor.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(executor.submit(next, items, end))
            yield item
