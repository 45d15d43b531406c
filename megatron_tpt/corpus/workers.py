"""Tasks spread over worker processes of one machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_tpt.errors import UserError


def run_tasks[T](work: Callable[[T], Iterator[int]], tasks: Sequence[T], num_workers: int) -> Iterator[int]:
    """Do `work(task)` for every task, in at most `num_workers` processes, and yield what the tasks yield as it comes.

    `work` is a function of a module (workers are spawned) that leaves its results in files and yields how much it has
    done. What a task raises is raised here; a worker that dies is a RuntimeError that names its task and how it ended.
    With one worker or one task nothing is spawned. Workers end when this process does.
    """
    if num_workers == 1 or len(tasks) <= 1:
        for task in tasks:
            yield from work(task)
        return
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(tasks))
    workers: dict[Connection, tuple[Any, T]] = {}
    try:
        for _ in range(min(num_workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work, theirs))
            process.start()
            theirs.close()
            workers[ours] = process, waiting.pop()
            ours.send(workers[ours][1])
        while workers:
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                process, task = workers[connection]
                try:
                    kind, value = connection.recv()
                except EOFError:
                    process.join()
                    raise RuntimeError(f"{_death(process)} while at {task}; run the same command again") from None
                if kind == "progress":
                    yield value
                elif kind == "error":
                    raise value
                elif waiting:
                    workers[connection] = process, waiting.pop()
                    connection.send(workers[connection][1])
                else:
                    del workers[connection]
                    connection.close()
                    process.join()
    finally:
        for connection, (process, _) in workers.items():
            process.terminate()
            process.join()
            connection.close()


def _death(process: Any) -> str:
    code = process.exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"worker {process.pid} {how}{hint}"


def _serve(work: Callable[[Any], Iterator[int]], connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    while True:
        try:
            task = connection.recv()
        except EOFError:  # all is done
            return
        try:
            for progress in work(task):
                connection.send(("progress", progress))
        except UserError as error:
            connection.send(("error", error))
            return
        connection.send(("done", None))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
