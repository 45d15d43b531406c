"""Locks: of two processes that start the same task, on one machine or two, only one does it.

filelock's `lock_descriptor` takes the lock. Its `FileLock` opens files itself, and what is locked here is also a folder
(of an index), and a journal that its holder writes.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import lock_descriptor, unlock_descriptor

from megatron_tpt.errors import UserError
from megatron_tpt.files import no_links

_MISSING = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What flock(2) ends with on a file system without locks."""
_NO_LOCKS = "MEGATRON_TPT_NO_LOCKS"


class TaskLocked(UserError):
    """Another process holds the lock."""


def has_locks() -> bool:
    """Whether locks are taken: not where the user has turned them off."""
    return os.environ.get(_NO_LOCKS) != "1"


@contextlib.contextmanager
def task_lock(folder: str | Path, task: int, *, timeout_s: float = 10) -> Iterator[None]:
    """Hold the lock of task number `task` of the job whose files are in `folder`, which is made if need be.

    Waits up to `timeout_s` for another holder to end (one that was killed may take a moment), then raises `TaskLocked`,
    which says who holds it.

    The lock is flock(2) on `folder/.task_00003.lock`. The kernel releases it when its holder ends, however it ends, so
    none is ever left over; the file stays, since removing it would let two processes lock two files of one name. (A
    child that was forked without exec shares the lock, and keeps it while it lives.) Between machines it is as good as
    the file system's locks: NFS needs version 4, or 3 with lockd, and no `nolock` or `local_lock` among its mount
    options; Lustre needs the mount option `flock`, its default since 2.13 (`localflock` guards one machine only). A
    file system without locks is a UserError, unless MEGATRON_TPT_NO_LOCKS=1 turns locks off.
    """
    with exclusive(_task_lock_path(folder, task), f"task {task}", timeout_s=timeout_s):
        yield


def is_task_locked(folder: str | Path, task: int) -> bool:
    """Whether a process holds the `task_lock`, here or on another machine; False without locks."""
    path = _task_lock_path(folder, task)
    if not has_locks() or not path.exists():
        return False
    with open(path, "a+", opener=no_links) as file:
        return not _try_lock(file.fileno(), path)  # closed at once: who begins the task now waits that long


def _task_lock_path(folder: str | Path, task: int) -> Path:
    return Path(folder) / f".task_{task:05d}.lock"


@contextlib.contextmanager
def exclusive(path: Path, what: str, *, timeout_s: float) -> Iterator[None]:
    """Hold the lock file `path`; `what` names in a message what it guards. See `task_lock`."""
    if not has_locks():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not truncated by opening: it says who holds the lock. Open for writing, since NFS refuses to lock otherwise.
    with open(path, "a+", encoding="utf-8", opener=no_links) as file:
        if not locked(file.fileno(), path, timeout_s=timeout_s):
            file.seek(0)
            raise TaskLocked(f"{what} is being run already by {file.read().strip()}: wait for it, or stop it")
        file.truncate(0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        file.flush()
        try:
            yield
        finally:
            unlock_descriptor(file.fileno())  # not only by closing it: a fork may have it open as well


def locked(descriptor: int, path: Path, *, timeout_s: float) -> bool:
    """Lock the open file `path` until it is closed; False when another holder has not ended after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while has_locks() and not _try_lock(descriptor, path):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
    return True


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if error.errno in _MISSING:
            raise UserError(
                f"{path.parent} is on a file system without locks (Lustre: mount it with -o flock); choose another "
                f"folder, or set {_NO_LOCKS}=1 and make sure yourself that nothing runs twice at once"
            ) from error
        raise
