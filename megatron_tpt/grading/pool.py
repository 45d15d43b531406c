"""Grade in worker processes that can be killed: an answer that hangs or crashes only loses its own grade.

The limit is one of processor time, so that a busy machine grades as an idle one does. The kernel enforces it
(RLIMIT_CPU), even in the middle of an operation on huge integers, and when this process is gone.
"""

import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

from megatron_tpt.errors import Fault, UserError
from megatron_tpt.grading.grader import Grade, Grader, Item, Rules
from megatron_tpt.processes import interrupts_blocked

_WALL_FACTOR = 10
"""Real time that an item may take, as a multiple of its processor time: for what hangs without computing."""
_START_LIMIT_S = 300.0
_MEMORY = 4 << 30


@dataclass
class _Worker:
    process: Any
    connection: Connection
    index: int | None = None
    """The item it grades; None while it starts or waits."""
    ready: bool = False
    deadline: float = 0.0


class GraderPool:
    """Grades many outputs on several processes; use it as a context manager.

    Raises UserError when a library or the sandbox is missing. To be used by one thread at a time.
    """

    def __init__(self, rules: Rules, num_workers: int | None = None, time_limit_s: float = 5.0) -> None:
        Grader(rules)  # refuses what cannot work here
        self._rules = rules
        self._num_workers = num_workers or min(16, len(os.sched_getaffinity(0)))
        self._time_limit_s = time_limit_s
        # A program's own limit comes first; the pool's is for the grader around it.
        self._wall_limit_s = _WALL_FACTOR * max(time_limit_s, rules.code_time_limit_s)
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        while self._workers:
            self._drop(self._workers[-1])

    def grade(self, items: Iterable[Item]) -> list[Grade]:
        """The grades of `items`, in their order. Raises UserError for a reference that cannot be read."""
        grades: dict[int, Grade] = {}
        remaining = iter(enumerate(items))
        waiting = next(remaining, None)
        try:
            while waiting is not None or any(worker.index is not None for worker in self._workers):
                if waiting is not None and self._all_busy() and len(self._workers) < self._num_workers:
                    self._workers.append(self._start())
                for worker in self._workers:
                    if waiting is not None and worker.ready and worker.index is None:
                        self._give(worker, *waiting)
                        waiting = next(remaining, None)
                for index, grade in self._collect():
                    grades[index] = grade
        except BaseException:
            self.close()  # grades in flight must not be mistaken for a later call's
            raise
        return [grades[index] for index in sorted(grades)]

    def _all_busy(self) -> bool:
        return all(worker.index is not None or not worker.ready for worker in self._workers)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, self._rules, self._time_limit_s), daemon=True, name="grader"
        )
        with interrupts_blocked():
            process.start()
        theirs.close()  # so that ours ends with the process
        return _Worker(process, ours, deadline=time.monotonic() + _START_LIMIT_S)

    def _give(self, worker: _Worker, index: int, item: Item) -> None:
        worker.index, worker.deadline = index, time.monotonic() + self._wall_limit_s
        with contextlib.suppress(OSError):  # it has died: _collect() reports it
            worker.connection.send(item)

    def _collect(self) -> Iterator[tuple[int, Grade]]:
        """Wait for the next answers, deaths and deadlines."""
        busy = [worker for worker in self._workers if worker.index is not None or not worker.ready]
        if not busy:
            return
        until = min(worker.deadline for worker in busy)
        readable = wait([worker.connection for worker in busy], max(0.0, until - time.monotonic()))
        for worker in busy:
            if worker.connection in readable:
                yield from self._receive(worker)
            elif time.monotonic() >= worker.deadline:
                yield from self._lost(worker, hung=True)

    def _receive(self, worker: _Worker) -> Iterator[tuple[int, Grade]]:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            yield from self._lost(worker, hung=False)
            return
        if isinstance(answer, UserError):
            raise answer
        if not worker.ready:
            worker.ready = True
            return
        assert worker.index is not None
        yield worker.index, answer
        worker.index = None

    def _lost(self, worker: _Worker, hung: bool) -> Iterator[tuple[int, Grade]]:
        self._drop(worker)
        if worker.index is None:
            raise Fault(f"a process that grades answers did not start (exit code {worker.process.exitcode})")
        if hung or worker.process.exitcode == -signal.SIGXCPU:
            yield worker.index, Grade(False, reason="time-out")
        else:
            yield worker.index, Grade(False, reason="crash", detail=f"exit code {worker.process.exitcode}")

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.connection.close()


def _work(connection: Connection, rules: Rules, time_limit_s: float) -> None:
    """A worker: grades what comes until the other end is closed."""
    logging.disable(logging.ERROR)  # math-verify warns of every answer that it cannot read
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_AS, _MEMORY)
    grader = Grader(rules)
    if rules.kind == "math":
        import math_verify  # noqa: F401  (takes seconds, which must not count for the first answer)
    connection.send("ready")
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        _allow(time_limit_s)
        try:
            answer: Grade | UserError = grader.grade(item)
        except UserError as error:
            answer = error
        except Exception as error:  # a fault of a library on hostile input, or too little memory
            answer = Grade(False, reason="crash", detail=f"{type(error).__name__}: {str(error)[:200]}")
        connection.send(answer)


def _allow(seconds: float) -> None:
    """Have the kernel end this process when it has computed for `seconds` more (whole seconds, at least one)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + max(1.0, seconds)) + 1)


def _lower(kind: int, limit: int) -> None:
    """Limit this process, or leave it at what the system allows, where that is less."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
