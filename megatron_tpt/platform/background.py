"""Work in a forked process, on a snapshot of this one's memory.

The process sees the memory as it was at that moment, whatever this process changes afterwards, and shares
the pages that stay unchanged. It must not touch a GPU: what it needs from there is copied to the CPU before.
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
    gc.disable()  # what this process inherited is its parent's to destroy: there may be tensors on a GPU among it
    os.nice(_NICENESS)
    exit_with_parent()  # it holds the parent's sockets, too
    try:
        outcome: tuple[T | None, OSError | None] = work(), None
    except OSError as error:
        outcome = None, error
    connection.send(outcome)


class BackgroundWork[T]:
    """`work()` in its own process. What it returns is pickled; it must not start threads of torch."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._connection, theirs = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_run, args=(work, theirs), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def is_over(self) -> bool:
        """Whether `result` has nothing to wait for."""
        return self._connection.poll()

    def result(self) -> T:
        """Wait for what the work returned. Raises the OSError that it raised, and one for a process that was killed."""
        try:
            value, error = self._connection.recv()
        except (EOFError, OSError):  # there is no more to come, or only a part came
            self._process.join()
            value, error = None, ChildProcessError(f"the background process ended with code {self._process.exitcode}")
        self._end()
        if error is not None:
            raise error
        return value

    def kill(self) -> None:
        """End the work, wherever it is."""
        if not self._connection.closed:
            self._process.kill()
            self._end()

    def _end(self) -> None:
        self._process.join()
        self._process.close()
        self._connection.close()
