"""Processes that do not outlive the one that started them, however that ends (Linux)."""

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.context import ForkProcess, SpawnProcess
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NoReturn

from megatron_tpt.errors import Terminated

_MAX_FILES = 1 << 16
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent(signum: signal.Signals) -> None:
    """Have the kernel send us `signum` when the thread that started this process is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signum))


def exit_with_parent() -> None:
    """Have a thread end this process of `multiprocessing` when its parent is gone, whichever of its threads started us.

    Unlike the kernel's signal it is late while the interpreter is busy.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Block SIGINT in this thread: processes that are started meanwhile never get it.

    Ctrl-C reaches all processes of a terminal, and the parent ends its workers. A worker that got the signal itself
    while its interpreter starts, before any code could ignore it, would print a traceback.
    """
    resource_tracker.ensure_running()  # which unblocks the signal when it starts its own process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def terminations_raised() -> Iterator[None]:
    """Have SIGTERM raise Terminated in here, if this is the main thread; others get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise_terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def raise_file_limit() -> None:
    """Let this process open as many files as it may: what shells set is a tenth of that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def num_files_left() -> int:
    """How many more files and connections this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (_MAX_FILES if soft == resource.RLIM_INFINITY else soft) - len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def children_end_with_us() -> Iterator[None]:
    """What is started meanwhile by `multiprocessing` (contexts "fork" and "spawn"), and what that starts in turn, is
    killed when the thread that started it is gone. So it is for libraries that leave their processes behind when ours
    is killed; call it in a thread that lives as long as they are needed.
    """
    bound: dict[str, Any] = {"fork": _Forked, "spawn": _Spawned}
    contexts: dict[str, Any] = {method: multiprocessing.get_context(method) for method in bound}
    before = {method: context.Process for method, context in contexts.items()}
    try:
        for method, context in contexts.items():
            context.Process = bound[method]
        yield
    finally:
        for method, context in contexts.items():
            context.Process = before[method]


class _EndsWithParent(BaseProcess):
    def run(self) -> None:
        end_with_parent(signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:  # it was gone before we asked
            os.kill(os.getpid(), signal.SIGKILL)
        with children_end_with_us():
            super().run()


class _Forked(_EndsWithParent, ForkProcess):
    pass


class _Spawned(_EndsWithParent, SpawnProcess):
    pass
