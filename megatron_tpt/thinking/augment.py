"""Augmenting: read documents, let a model think about each, write records with the thinking, in shards.

    OUTPUT/augment.json                        the settings, written first; a run with other settings is refused
    OUTPUT/part-00003-00017.jsonl.zst          the records of block 17 (some consecutive rows) of source number 3
    OUTPUT/rejects/part-00003-00017.jsonl.zst  what came to nothing in that block, and why
    OUTPUT/README.md                           the data set card; it says so while tasks have not finished
    OUTPUT/.work/{journal,ledger,progress}/    see journal.py, ledger.py, progress.py, status.py
    OUTPUT/.work/finished/task-00003-of-00064  that a task has come to the end of its share
    OUTPUT/.work/{retries,refilter.json}       see retry.py, refilter.py

A shard appears whole or not at all, and changes only as a whole, when its rejects are asked again or other filters are
applied. The same command run again after a crash asks only for what was not finished. Requests of several blocks are in
flight at once, so that the engine stays full while the last documents of a block finish. A job of several tasks divides
the sources among them, or the blocks where there are fewer sources than tasks; tasks share nothing but the folder.
"""

import contextlib
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_tpt.config.cli import as_called
from megatron_tpt.errors import FILE_LIMIT_ADVICE, Fault, UserError
from megatron_tpt.generation import Completion, EngineOptions, Request, open_engine
from megatron_tpt.generation.dispatch import DEFAULT_MAX_IN_FLIGHT
from megatron_tpt.processes import num_files_left
from megatron_tpt.records import Progress as ReadProgress
from megatron_tpt.records import Row, Source, describe, notes_of_columns_not_kept, read_blocks
from megatron_tpt.scale import TaskReport, run_tasks, task_lock
from megatron_tpt.thinking.card import write_card
from megatron_tpt.thinking.first_answers import FirstAnswers
from megatron_tpt.thinking.job import Generator, Job, note_settings, plan
from megatron_tpt.thinking.journal import Journal, Line
from megatron_tpt.thinking.ledger import Entry, IdSet, Ledger, id_digest
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.progress import Progress, Reporter, counts, progress_path, read_progress, write_progress
from megatron_tpt.thinking.refilter import end_refilter, refilter
from megatron_tpt.thinking.retry import Retry, check_retry
from megatron_tpt.thinking.rows import OpenRow, Outcome, count_rejects, make_reject
from megatron_tpt.thinking.settings import SETTINGS_NAME, check_job
from megatron_tpt.thinking.shards import Output, block_name
from megatron_tpt.thinking.status import show_status, total_input_bytes

_REJECTS_UNTIL_WARNING = 100
_OTHER_FILES = 24
"""Files that are open besides connections and journals."""


def augment(options: AugmentOptions) -> Progress:
    """Do the job that `options` describe, or the one task of it that they name.

    Raises UserError for what the user can mend, before anything is written; Fault where one machine of a job of many
    tasks lacks what the others have.
    """
    job = _looked_over(options, lambda: _begin(options))
    settings_path = options.output / SETTINGS_NAME
    generator = None if settings_path.exists() else job.generator()
    note_settings(job)
    num_tasks = options.scale.num_tasks
    with task_lock(Output(options.output).locks, options.task or 0):
        retry = Retry(job, Output(options.output), options.task or 0)
        if options.retry_rejects:
            generator = generator or _looked_over(options, job.generator)
            _reopen(job, retry, generator)
        task = _Task(job)  # not before: what another process had in hand is done by now
        blocks = task.blocks()
        first = next(blocks, None)
        if first is None:
            shards = f"all {task.progress.shards_skipped:,} shards are there"
            print(f"{options.output}: {shards}; nothing to do", file=sys.stderr)
            task.note_progress()
        else:
            task.run(generator or _looked_over(options, job.generator), itertools.chain([first], blocks))
        task.output.note_finished(task.number, num_tasks)
        if not task.output.unfinished_tasks(num_tasks):
            _write_card(job, task.output)
        retry.end()
    _say(task.progress.reject_report())
    conclude(options)
    return task.progress


def _begin(options: AugmentOptions) -> Job:
    """Look over the options, and whether the folder is that of such a job."""
    job, output = plan(options), Output(options.output)
    _say(f"note: {note}" for note in options.notes())
    if not options.task:  # the first task says it for all
        _say(f"note: {note}" for note in notes_of_columns_not_kept(job.sources, job.columns))
    check_job(output, job.settings)
    check_retry(options, output)
    return job


def _reopen(job: Job, retry: Retry, generator: Generator) -> None:
    task = _Task(job)
    retry.begin(generator.worker, task.sources(), task.owns)
    if task.output.unfinished_tasks(job.options.scale.num_tasks):
        _write_card(job, task.output)  # which says so while it lasts


def apply_filters(options: AugmentOptions) -> Progress:
    """Apply the filters in `options` to all that the job has generated, see `refilter`."""
    job, output = plan(options), Output(options.output)
    _say(f"note: {note}" for note in options.notes())
    progress = refilter(job, output, lambda: _write_card(job, output, ["other filters are being applied"]))
    _write_card(job, output)
    end_refilter(output)
    _say(progress.reject_report())
    conclude(options)
    return progress


def conclude(options: AugmentOptions) -> None:
    """Where all tasks of a job have come to their end, say what to do next.

    Raises UserError where not a single document has become a record.
    """
    output = Output(options.output)
    if output.unfinished_tasks(options.scale.num_tasks):
        return
    total, _ = output.totals()
    if not total.records and total.rejects:
        raise UserError(
            f"{output.folder}: the job has come to its end without a single record: all {total.rejects.total():,} "
            f"documents were rejected ({counts(total.rejects)}; the texts are in {output.rejects}); apply other "
            "--filters with --refilter, or ask again with --retry-rejects REASON..., or choose another --output"
        )
    folder = shlex.quote(str(output.folder))
    following = as_called(f"python tools/index.py --input {folder} --tokenizer TOKENIZER_DIR --output PREFIX")
    print(f"{output.folder}: {total.records:,} records. Next: {following}", file=sys.stderr)


def _within_file_limit(options: EngineOptions) -> EngineOptions:
    """With fewer concurrent requests where the limit of open files does not allow their connections and journals."""
    if options.kind != "endpoint":
        return options
    wanted = options.max_num_seqs or DEFAULT_MAX_IN_FLIGHT
    possible = max((num_files_left() - _OTHER_FILES) // (2 * len(options.endpoints)), 1)
    if wanted <= possible:
        return options
    _say([f"note: {possible} requests at once in place of {wanted}: {FILE_LIMIT_ADVICE} for more"])
    return replace(options, max_num_seqs=possible)


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _looked_over[T](options: AugmentOptions, look: Callable[[], T]) -> T:
    """What `look` finds. What is wrong now in a task, and was in order when the job began, is wrong with this machine
    (a file system that is not there, say): a Fault, which stops no other task."""
    try:
        return look()
    except UserError as error:
        if options.task is None or not (options.output / SETTINGS_NAME).exists():
            raise
        raise Fault(f"{error} (when the job began this was in order)") from error


def launch(options: AugmentOptions, command: Sequence[str]) -> TaskReport:
    """Run `command`, whose options these are, as the tasks that it is to be split into.

    Raises UserError for what the user can mend, before anything is started.
    """
    job = _begin(options)
    job.generator()
    note_settings(job)
    output = Output(options.output)
    num_tasks = options.scale.num_tasks
    if options.retry_rejects:  # what comes of the round is known when all of them are at its end
        for task in range(num_tasks):
            output.note_reopened(task, num_tasks)
    with show_status(output, num_tasks, total_input_bytes(job.sources)):
        report = run_tasks(command, options.scale, output.logs)
    _write_card(job, output)
    return report


def _write_card(job: Job, output: Output, missing: Sequence[str] = ()) -> None:
    total, num_gone = output.totals()
    unfinished = output.unfinished_tasks(job.options.scale.num_tasks)
    missing = list(missing)
    if unfinished:
        missing.append(f"{len(unfinished):,} of {job.options.scale.num_tasks:,} tasks have not finished")
    missing += [f"{num_gone:,} finished shards are missing or damaged"] if num_gone else []
    write_card(output.folder, job.settings, total, missing)


@dataclass
class _Block:
    """A block that is not done."""

    source: Source
    name: str
    ledger: Ledger
    rows: Iterator[Row]
    journal: Journal = field(init=False)
    """Of a block whose rows are being read."""
    open_rows: int = 0
    """Rows that are being thought about."""
    is_read: bool = False
    """Whether all its rows have been seen."""


class _Task:
    """The walk of one task over its share of the input."""

    def __init__(self, job: Job) -> None:
        self.number = job.options.task or 0
        self.output = Output(job.options.output)
        self.progress = Progress()
        self._job = job
        self._num_tasks = job.options.scale.num_tasks
        self._share = 1.0 if len(job.sources) >= self._num_tasks else 1 / self._num_tasks
        """Of what it goes through, what is its own."""
        previous = read_progress(self._progress_path)
        if previous is not None:
            self.progress.examples = previous.examples
        self._ids = IdSet()
        self._read_sources: set[int] = set()
        """Whose content was compared with what the job that wrote them recorded."""
        self._finished_bytes = 0
        self._open_bytes = 0
        """Of the rows that are being thought about."""
        self._read = ReadProgress()
        self._is_warned = False
        self._first = FirstAnswers(self.output, self.progress)
        self._end = 0
        self._num_devices = 1
        self._last_finish_s = 0.0
        """When a block was finished last, or the engine was ready."""

    def sources(self) -> list[tuple[int, Source]]:
        """The sources of which the task has a share, by their numbers."""
        sources = list(enumerate(self._job.sources))
        return sources[self.number :: self._num_tasks] if len(sources) >= self._num_tasks else sources

    def owns(self, source: int, block: int) -> bool:
        """Whole sources where there are enough of them: then a task reads nothing that another reads."""
        turn = source if len(self._job.sources) >= self._num_tasks else source + block
        return turn % self._num_tasks == self.number

    def blocks(self) -> Iterator[_Block]:
        """The blocks of this task that are not done, each to be read to its end before the next is taken."""
        rows_left = self._job.options.limit
        sources = self.sources()
        if rows_left is None:  # else it is not known how much will be looked at
            self.progress.input_bytes = round(self._share * sum(source.num_bytes or 0 for _, source in sources))
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

    def _source_blocks(self, number: int, source: Source, ledger: Ledger, limit: int | None) -> Iterator[_Block]:
        rows_per_block = self._job.options.rows_per_shard

        def is_beyond(row: int) -> bool:
            return limit is not None and row >= limit

        def is_wanted(block: int) -> bool:
            name = block_name(number, block)
            if is_beyond(block * rows_per_block):
                return True  # to end the walk there
            is_ours = self.owns(number, block)
            if is_ours and self.output.set_aside_damaged(name):
                self.output.note_reopened(self.number, self._num_tasks)
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
            yield _Block(source, block_name(number, block), ledger, inside)

    def run(self, generator: Generator, blocks: Iterator[_Block]) -> None:
        """Think about all rows of `blocks`."""
        with contextlib.closing(self.output), open_engine(_within_file_limit(generator.engine_options)) as engine:
            self._num_devices, self._last_finish_s = engine.num_devices, time.monotonic()
            reporter = Reporter(self.progress, self._progress_path, self._input_bytes_done)
            try:
                for ended in engine.generate(self._requests(generator, blocks)):
                    for request, outcome in self._first.take(*ended):
                        block, row, number = request.key
                        self._answered(generator, block, row, number, outcome)
                    reporter.show()
                self._first.end()
            finally:
                reporter.show(last=True)

    def note_progress(self) -> None:
        """Say how far the task is where there is nothing to run."""
        self.progress.input_bytes_done = self._input_bytes_done()
        write_progress(self.progress, self._progress_path)

    @property
    def _progress_path(self) -> Path:
        return progress_path(self.output.progress, self.number, self._num_tasks)

    def _input_bytes_done(self) -> int:
        passed = round(self._share * (self._finished_bytes + self._read.num_bytes))
        return min(max(passed - self._open_bytes, 0), self.progress.input_bytes)

    def _count_before(self, entry: Entry | None) -> None:
        """Count what an earlier run has done."""
        if entry is not None:
            self.progress.records_before += entry.statistics.records
            self.progress.rejects_before.update(entry.statistics.rejects)
            self.progress.chunk_rejects_before.update(entry.statistics.chunk_rejects)

    def _requests(self, generator: Generator, blocks: Iterator[_Block]) -> Iterator[Request]:
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

    def _open(self, generator: Generator, block: _Block, row: Row) -> OpenRow | None:
        """The row as one to think about; None when it is finished already, or has come to nothing."""
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

    def _reject(self, block: _Block, row: Row) -> None:
        """A row that is no record, or a record whose id was there before."""
        if row.record is None and self._job.options.on_bad_record == "stop":
            raise UserError(describe(block.source, row))
        record_id, reason = (None, row.problem or "") if row.record is None else (row.record.id, "duplicate_id")
        reject = make_reject(record_id, block.source.name, row.number, reason, row.detail)
        block.journal.add(Line(row.number, None, [], [reject]))
        self.progress.rejects[reason] += 1
        self.progress.note_rejects([reject])

    def _answered(self, generator: Generator, block: _Block, row: OpenRow, request: int, outcome: Outcome) -> None:
        if isinstance(outcome, Completion):
            self.progress.prompt_tokens += outcome.num_prompt_tokens
            self.progress.thinking_tokens += outcome.num_tokens
        generator.worker.answered(row, request, outcome, block.journal)
        if row.is_done:
            self._close(generator, block, row)

    def _close(self, generator: Generator, block: _Block, row: OpenRow) -> None:
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
        """Tell early of filters, or a model, of which nothing comes: a long job would end without a record."""
        done = self.progress
        if self._is_warned or done.records + done.records_before or done.rejects.total() < _REJECTS_UNTIL_WARNING:
            return
        self._is_warned = True
        _say(["warning: not one record so far:", *(f"warning: {line}" for line in done.reject_report())])

    def _finish_if_done(self, block: _Block) -> None:
        if block.is_read and not block.open_rows:
            now_s = time.monotonic()
            generator_s = (now_s - self._last_finish_s) * self._num_devices
            self._last_finish_s = now_s
            self.output.finish(block.name, block.journal, block.ledger, generator_s)
            self.progress.shards += 1
