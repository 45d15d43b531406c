"""One task of an augment run: the walk over its share of the input, and what is made of the answers."""

import contextlib
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_tpt.errors import FILE_LIMIT_ADVICE, UserError
from megatron_tpt.generation import Completion, EngineOptions, Request, open_engine
from megatron_tpt.generation.dispatch import DEFAULT_MAX_IN_FLIGHT
from megatron_tpt.jobs.folder import Share
from megatron_tpt.jobs.progress import Reporter, write_progress
from megatron_tpt.processes import num_files_left
from megatron_tpt.records import ReadProgress, Row, Source, describe, read_blocks
from megatron_tpt.thinking.first_answers import FirstAnswers
from megatron_tpt.thinking.job import AugmentJob, Generator
from megatron_tpt.thinking.journal import Journal, Line
from megatron_tpt.thinking.ledger import Entry, IdSet, Ledger, id_digest
from megatron_tpt.thinking.progress import AugmentProgress, read_progress
from megatron_tpt.thinking.rows import OpenRow, Outcome, count_rejects, make_reject
from megatron_tpt.thinking.shards import Output, block_name

logger = logging.getLogger(__name__)

_REJECTS_UNTIL_WARNING = 100
_OTHER_FILES = 24
"""Files that are open in addition to connections and journals."""


@dataclass
class Block:
    """A block that is not done."""

    source: Source
    name: str
    ledger: Ledger
    rows: Iterator[Row]
    journal: Journal = field(init=False)
    """Of a block whose rows are being read."""
    open_rows: int = 0
    """Rows in flight."""
    is_read: bool = False
    """Whether all its rows have been seen."""


class Task:
    """The walk of one task over its share of the input."""

    def __init__(self, job: AugmentJob) -> None:
        self.number = job.options.task or 0
        self.output = Output(job.options.output)
        self.progress = AugmentProgress()
        self._job = job
        self.share = Share(self.number, job.options.scale.num_tasks, len(job.sources))
        previous = read_progress(self._progress_path)
        if previous is not None:
            self.progress.examples = previous.examples
        self._ids = IdSet()
        self._read_sources: set[int] = set()
        """Whose content was compared with what the job that wrote them recorded."""
        self._finished_bytes = 0
        self._open_bytes = 0
        """Of the rows in flight."""
        self._read = ReadProgress()
        self._is_warned = False
        self._first = FirstAnswers(self.output, self.progress)
        self._end = 0
        self._num_devices = 1
        self._last_finish_s = 0.0
        """When a block was finished last, or the engine was ready."""

    def blocks(self) -> Iterator[Block]:
        """The blocks of this task that are not done, each to be read to its end before the next is taken."""
        rows_left = self._job.options.limit
        sources = self.share.of(self._job.sources)
        if rows_left is None:  # else it is not known how much will be read
            self.progress.input_bytes = round(self.share.fraction * sum(source.num_bytes or 0 for _, source in sources))
        for number, source in sources:
            if rows_left is not None and rows_left <= 0:
                return
            ledger = Ledger(self.output.ledgers, number, self.number)
            self._end = 0
            yield from self._source_blocks(number, source, ledger, rows_left)
            self._finished_bytes += source.num_bytes or 0
            self._read = ReadProgress()
            if rows_left is not None:
                rows_left -= max([self._end, *(entry.end for entry in ledger.entries.values())])

    def _source_blocks(self, number: int, source: Source, ledger: Ledger, limit: int | None) -> Iterator[Block]:
        rows_per_block = self._job.options.rows_per_shard

        def is_beyond(row: int) -> bool:
            return limit is not None and row >= limit

        def is_wanted(block: int) -> bool:
            name = block_name(number, block)
            if is_beyond(block * rows_per_block):
                return True  # to end the walk there
            is_ours = self.share.owns(number, block)
            if is_ours and self.output.set_aside_damaged(name):
                self.output.note_reopened(self.number, self.share.num_tasks)
            if self.output.is_done(name):
                if name in ledger.entries:
                    self._ids.update(ledger.entries[name].digests)
                if is_ours:
                    self.progress.shards_skipped += 1
                    self._count_before(ledger.entries.get(name))
                return False
            return is_ours

        for block, rows in read_blocks(source, self._job.columns, rows_per_block, is_wanted, self._read):
            if is_beyond(block * rows_per_block):
                return
            if number not in self._read_sources:
                self._read_sources.add(number)
                source.require_content()
            inside = itertools.takewhile(lambda row: not is_beyond(row.number), rows)
            yield Block(source, block_name(number, block), ledger, inside)

    def run(self, generator: Generator, blocks: Iterator[Block]) -> None:
        """Think about all rows of `blocks`."""
        with contextlib.closing(self.output), open_engine(_within_file_limit(generator.engine_options)) as engine:
            self._num_devices, self._last_finish_s = engine.num_devices, time.monotonic()
            with Reporter(self.progress, self._progress_path, self._note_time) as reporter:
                for ended in engine.generate(self._requests(generator, blocks)):
                    for request, outcome in self._first.take(*ended):
                        block, row, number = request.key
                        self._answered(generator, block, row, number, outcome)
                    reporter.show()
                self._first.end()

    def note_progress(self) -> None:
        """Say how far the task is where there is nothing to run."""
        self.progress.input_bytes_done = self._input_bytes_done()
        write_progress(self.progress, self._progress_path)

    def _note_time(self, elapsed_s: float) -> None:
        self.progress.generation_s = elapsed_s
        self.progress.input_bytes_done = self._input_bytes_done()

    @property
    def _progress_path(self) -> Path:
        return self.output.progress_path(self.number, self.share.num_tasks)

    def _input_bytes_done(self) -> int:
        passed = round(self.share.fraction * (self._finished_bytes + self._read.num_bytes))
        return min(max(passed - self._open_bytes, 0), self.progress.input_bytes)

    def _count_before(self, entry: Entry | None) -> None:
        """Count what an earlier run has done."""
        if entry is not None:
            self.progress.records_before += entry.statistics.records
            self.progress.rejects_before.update(entry.statistics.rejects)
            self.progress.chunk_rejects_before.update(entry.statistics.chunk_rejects)

    def _requests(self, generator: Generator, blocks: Iterator[Block]) -> Iterator[Request]:
        for block in blocks:
            journal = self.output.journal(block.name)
            if journal is None:
                self.progress.shards_skipped += 1
                continue
            block.journal = journal
            place = self._read.num_bytes
            for row in block.rows:
                self._end = row.number + 1
                num_bytes, place = self._read.num_bytes - place, self._read.num_bytes
                if (opened := self._open(generator, block, row)) is None:
                    continue
                opened.num_bytes = num_bytes
                self._open_bytes += num_bytes
                block.open_rows += 1
                if opened.is_done:  # its last answer was the last thing an earlier run did
                    self._close(generator, block, opened)
                for request, prompt, seed in generator.worker.requests(opened):
                    yield Request(prompt, replace(generator.sampling, seed=seed), (block, opened, request))
            block.is_read = True
            self._finish_if_done(block)

    def _open(self, generator: Generator, block: Block, row: Row) -> OpenRow | None:
        """The row as one to think about; None when it is finished already, or was rejected."""
        digest = id_digest(row.record.id) if row.record is not None else None
        if row.number not in block.journal:
            if digest is not None and digest not in self._ids:
                self._ids.add(digest)
                return generator.worker.open(row, block.source.name, block.journal)
            self._reject(block, row)
            return None
        line = block.journal.line(row.number)
        rejects, chunk_rejects = count_rejects(line.rejects)
        self.progress.note_rejects(line.rejects)
        self.progress.records_before += len(line.records)
        self.progress.rejects_before.update(rejects)
        self.progress.chunk_rejects_before.update(chunk_rejects)
        if digest is not None:
            self._ids.add(digest)
        return None

    def _reject(self, block: Block, row: Row) -> None:
        """A row that is no record, or a record with an id that occurred before."""
        if row.record is None and self._job.options.on_bad_record == "stop":
            raise UserError(describe(block.source, row))
        record_id, reason = (None, row.problem or "") if row.record is None else (row.record.id, "duplicate_id")
        reject = make_reject(record_id, block.source.name, row.number, reason, row.detail)
        block.journal.add(Line(row.number, None, [], [reject]))
        self.progress.rejects[reason] += 1
        self.progress.note_rejects([reject])

    def _answered(self, generator: Generator, block: Block, row: OpenRow, request: int, outcome: Outcome) -> None:
        if isinstance(outcome, Completion):
            self.progress.prompt_tokens += outcome.num_prompt_tokens
            self.progress.thinking_tokens += outcome.num_tokens
        generator.worker.answered(row, request, outcome, block.journal)
        if row.is_done:
            self._close(generator, block, row)

    def _close(self, generator: Generator, block: Block, row: OpenRow) -> None:
        line = generator.worker.close(row)
        block.journal.add(line)
        block.open_rows -= 1
        self._open_bytes -= row.num_bytes
        self.progress.input_bytes_answered += row.num_bytes
        self.progress.records += len(line.records)
        self.progress.truncated += sum(record["meta"]["truncated"] for record in line.records)
        rejects, chunk_rejects = count_rejects(line.rejects)
        self.progress.note_rejects(line.rejects)
        self.progress.rejects.update(rejects)
        self.progress.chunk_rejects.update(chunk_rejects)
        self._warn_once_of_rejects()
        self._finish_if_done(block)

    def _warn_once_of_rejects(self) -> None:
        """Warn early of filters, or a model, that yield nothing: a long job would end without a record."""
        done = self.progress
        if self._is_warned or done.records + done.records_before or done.rejects.total() < _REJECTS_UNTIL_WARNING:
            return
        self._is_warned = True
        for line in ["not one record so far:", *done.reject_report()]:
            logger.warning(line)

    def _finish_if_done(self, block: Block) -> None:
        if block.is_read and not block.open_rows:
            now_s = time.monotonic()
            generator_s = (now_s - self._last_finish_s) * self._num_devices
            self._last_finish_s = now_s
            self.output.finish(block.name, block.journal, block.ledger, generator_s)
            self.progress.shards += 1


def _within_file_limit(options: EngineOptions) -> EngineOptions:
    """With fewer concurrent requests where the limit of open files does not allow their connections and journals."""
    if options.kind != "endpoint":
        return options
    wanted = options.max_num_seqs or DEFAULT_MAX_IN_FLIGHT
    possible = max((num_files_left() - _OTHER_FILES) // (2 * len(options.endpoints)), 1)
    if wanted <= possible:
        return options
    logger.info(f"note: {possible} requests at once in place of {wanted}: {FILE_LIMIT_ADVICE} for more")
    return replace(options, max_num_seqs=possible)
