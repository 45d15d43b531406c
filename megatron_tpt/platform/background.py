"""Runs work in a forked process, on a snapshot of this process's memory.

The forked process sees the memory as it was at the fork, whatever this process changes afterwards, and shares the pages
that do not change. It must not use a GPU: copy the data that it needs to the CPU first.
"""

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

from megatron_tpt.platform.signals import ignore_stop_signals
from megatron_tpt.processes import exit_with_parent

_FORK = multiprocessing.get_context("fork")
_NICENESS = 10  # the work leaves the cores to training


def _run[T](work: Callable[[], T], connection: Connection) -> None:
    ignore_stop_signals()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    gc.disable()  # inherited objects, such as tensors on a GPU, must only be destroyed by the parent
    os.nice(_NICENESS)
    exit_with_parent()  # it also holds the parent's sockets open
    try:
        outcome: tuple[T | None, OSError | None] = work(), None
    except OSError as error:
        outcome = None, error
    connection.send(outcome)


class BackgroundWork[T]:
    """Runs `work()` in a forked process. Its result is pickled; it must not start torch threads."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._connection, theirs = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_run, args=(work, theirs), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def is_over(self) -> bool:
        """Whether `result` would return at once."""
        return self._connection.poll()

    def result(self) -> T:
        """Wait for the result of the work. Raises the OSError that it raised, or one if the process was killed."""
        try:
            value, error = self._connection.recv()
        except (EOFError, OSError):  # the process sent nothing, or only a part of the result
            self._process.join()
            value, error = None, ChildProcessError(f"the background process ended with code {self._process.exitcode}")
        self._end()
        if error is not None:
            raise error
        return value

    def kill(self) -> None:
        """End the work at once."""
        if not self._connection.closed:
            self._process.kill()
            self._end()

    def _end(self) -> None:
        self._process.join()
        self._process.close()
        self._connection.close()
