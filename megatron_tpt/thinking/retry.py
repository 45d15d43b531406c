"""Retries documents that were rejected: blocks that are done are opened again.

    OUTPUT/.work/retries/task-00003-of-00064.json    for which reasons, and how far the round is

A block is opened by putting a journal next to its shard: whole or not at all, with everything that is kept of the
block. From then on it is a block in progress, like any other; its shard and its rejects are there until new ones take
their place. Where a run is killed, the same command resumes the round: no task repeats it. The round is over when all
tasks have finished it.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write
from megatron_tpt.jobs.folder import Share, task_name
from megatron_tpt.names import counted
from megatron_tpt.records import Row, Source, read_blocks
from megatron_tpt.thinking.job import AugmentJob
from megatron_tpt.thinking.journal import Answer, Line, path_of, write_journal
from megatron_tpt.thinking.ledger import Ledger
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.progress import counts
from megatron_tpt.thinking.revive import BlockLines, revive
from megatron_tpt.thinking.rows import ENGINE, RowWorker, answer_fields
from megatron_tpt.thinking.shards import Output, block_name

logger = logging.getLogger(__name__)

_ALL = "all"
_OPENING, _OPEN, _DONE = "opening", "open", "done"


class Retry:
    """One task's round of retries."""

    def __init__(self, job: AugmentJob, output: Output, task: int) -> None:
        self._job = job
        self._output = output
        self._task = task
        self._reasons = sorted(set(job.options.retry_rejects))
        self._path = output.retries / f"{task_name(task, job.options.scale.num_tasks)}.json"
        self._num_requests = Counter[str]()
        self._num_rows = 0
        self._num_of_input = Counter[str]()

    def begin(self, worker: RowWorker, share: Share) -> None:
        """Open the blocks of the task that have such rejects, unless an earlier run has done so and was killed. Raises
        UserError where there are none."""
        state = _read(self._path)
        if state is not None and state["reasons"] != self._reasons:
            raise UserError(
                f"{self._output.folder}: --retry-rejects {' '.join(state['reasons'])} was interrupted here; run it "
                "again, or run the job without --retry-rejects, to its end first"
            )
        if state is not None and state["stage"] != _OPENING:
            logger.info(f"{self._output.folder}: an interrupted round of --retry-rejects is resumed")
            return
        self._note(_OPENING)
        for number, source in share.of(self._job.sources):
            self._open_blocks(worker, number, source, share)
        self._note(_OPEN)
        logger.info(self._summary())

    def end(self) -> None:
        """The task has finished, whether or not it was started with --retry-rejects."""
        state, num_tasks = _read(self._path), self._job.options.scale.num_tasks
        if state is None:
            return
        self._reasons = state["reasons"]
        self._note(_DONE)
        states = [_read(self._output.retries / f"{task_name(task, num_tasks)}.json") for task in range(num_tasks)]
        if all(state is not None and state["stage"] == _DONE for state in states):
            for path in self._output.retries.glob("task-*"):
                path.unlink(missing_ok=True)

    def _note(self, stage: str) -> None:
        with atomic_write(self._path) as temporary:
            temporary.write_text(json.dumps({"reasons": self._reasons, "stage": stage}))

    def _open_blocks(self, worker: RowWorker, number: int, source: Source, share: Share) -> None:
        ledger = Ledger(self._output.ledgers, number, self._task)

        def is_wanted(block: int) -> bool:
            name = block_name(number, block)
            if not (share.owns(number, block) and self._output.is_done(name)):
                return False
            statistics = ledger.entries[name].statistics if name in ledger.entries else None
            return statistics is None or any(map(self._is_wanted, statistics.rejects + statistics.chunk_rejects))

        rows_per_block = self._job.options.rows_per_shard
        for block, rows in read_blocks(source, self._job.columns, rows_per_block, is_wanted):
            name = block_name(number, block)
            lines = BlockLines(self._job.options, *self._output.read_block(name))
            num_before = self._num_requests.total()
            kept = list(self._kept(worker, source, rows, lines))
            if self._num_requests.total() > num_before:
                self._output.note_reopened(self._task, self._job.options.scale.num_tasks)
                write_journal(path_of(self._output.journals, name), kept)

    def _kept(
        self, worker: RowWorker, source: Source, rows: Iterator[Row], lines: BlockLines
    ) -> Iterator[Line | Answer]:
        """What a journal holds of a block whose rejects are retried."""
        for row in rows:
            line = lines.line(row)
            if line is None:
                continue  # its shard was set aside: it is retried as it is
            wanted = [reject for reject in line.rejects if self._is_wanted(reject["reason"])]
            if line.id is None:
                self._num_of_input.update(reject["reason"] for reject in wanted)
            if line.id is None or not wanted:
                yield line
                continue
            opened = worker.open(row, source.name)
            thoughts = revive(self._job.options, opened, line, worker.count_tokens)
            self._num_rows += 1
            for request in range(opened.num_requests):
                thought = thoughts.get(request)
                if thought is not None and not (thought.reason and self._is_wanted(thought.reason)):
                    yield Answer(row.number, request, answer_fields(thought, thought.attempt))
                    continue
                reason = thought.reason if thought is not None and thought.reason else "lost"
                self._num_requests[reason] += 1
                if thought is not None and not reason.startswith(ENGINE):  # the same seed would give the same thought
                    yield Answer(row.number, request, answer_fields(None, thought.attempt + 1))

    def _is_wanted(self, reason: str) -> bool:
        return any(_fits(pattern, reason) for pattern in self._reasons)

    def _summary(self) -> str:
        folder = self._output.folder
        said = f"{folder}: {counted(self._num_rows, 'document')} to retry"
        if self._num_requests:
            said += f" ({counts(self._num_requests)})"
        if self._num_of_input:
            said += f"; rows of the input that are no documents of their own stay ({counts(self._num_of_input)})"
        return said


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def check_retry(options: AugmentOptions, output: Output) -> None:
    """Raise UserError where no finished shard of the whole job has such rejects, unless a round was interrupted."""
    if not options.retry_rejects or options.task is not None or any(output.retries.glob("task-*")):
        return
    total, _ = output.totals()
    rejects = total.rejects + total.chunk_rejects
    for reason in options.retry_rejects:
        if not any(_fits(reason, name) for name in rejects):
            there = f"there are: {counts(rejects)}" if rejects else "there are no rejects in finished shards"
            raise UserError(f"{output.folder}: --retry-rejects {reason}: no reject has this reason; {there}")


def _fits(pattern: str, reason: str) -> bool:
    return pattern == _ALL or fnmatchcase(reason, pattern)
