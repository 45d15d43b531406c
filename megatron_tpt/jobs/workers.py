"""Distributes tasks over worker processes on one machine."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from megatron_tpt import logs
from megatron_tpt.errors import Fault, UserError
from megatron_tpt.processes import exit_with_parent, interrupts_blocked


class Workers:
    """At most `num_workers` processes that do tasks. They start on demand, and end with the `with` block or with this
    process, however it ends.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._processes: dict[Connection, Any] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._processes.items():
            process.terminate()
            process.join()
            connection.close()

    def run[T](self, work: Callable[[T], Iterator[int]], tasks: Sequence[T]) -> Iterator[int]:
        """Run `work(task)` for every task, and yield the values that the tasks yield, as they come.

        `work` is a module-level function (workers are spawned) that writes its results to files and yields its
        progress. A UserError, Fault or OSError of a task is raised here; if a worker dies, raises a Fault that names
        its task and how it ended. With one worker or one task, everything runs in this process.
        """
        if self._num_workers == 1 or len(tasks) <= 1:
            for task in tasks:
                yield from work(task)
            return
        while len(self._processes) < min(self._num_workers, len(tasks)):
            self._start()
        waiting = list(reversed(tasks))
        idle = list(self._processes)
        busy: dict[Connection, T] = {}
        while waiting or busy:
            while waiting and idle:
                connection = idle.pop()
                busy[connection] = waiting.pop()
                connection.send((work, busy[connection]))
            for ready in wait(list(busy)):
                connection = cast(Connection, ready)
                try:
                    kind, value = connection.recv()
                except EOFError:
                    process = self._processes[connection]
                    process.join()
                    raise Fault(f"{_death(process)} while at {busy[connection]}; run the same command again") from None
                if kind == "progress":
                    yield value
                elif kind == "error":
                    raise value
                else:
                    idle.append(connection)
                    del busy[connection]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, logs.for_worker()))
        with interrupts_blocked():
            process.start()
        theirs.close()
        self._processes[ours] = process


def _death(process: Any) -> str:
    code = process.exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (out of memory? then with fewer --num-workers)" if code == -signal.SIGKILL else ""
    return f"worker {process.pid} {how}{hint}"


def _serve(connection: Connection, set_up_logs: Callable[[], None]) -> None:
    set_up_logs()
    exit_with_parent()
    while True:
        try:
            work, task = connection.recv()
        except (EOFError, ConnectionError):  # the parent has ended
            os._exit(1)
        try:
            for progress in work(task):
                _send(connection, ("progress", progress))
        except (UserError, Fault, OSError) as error:
            _send(connection, ("error", error))
        else:
            _send(connection, ("done", None))


def _send(connection: Connection, message: tuple[str, Any]) -> None:
    try:
        connection.send(message)
    except ConnectionError:  # the parent has ended, perhaps killed: there is no one to report to
        os._exit(1)
