"""Locks: if two processes, on one machine or two, start the same task, only one runs it.

filelock's `lock_descriptor` takes the lock. Its `FileLock` does not suit, since it opens files itself: here locks are
also taken on a folder (of an index) and on a journal that the holder writes.
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
"""The errors of flock(2) on a file system without locks."""
_NO_LOCKS = "MEGATRON_TPT_NO_LOCKS"


class TaskLocked(UserError):
    """Another process holds the lock."""


def has_locks() -> bool:
    """Whether locking is enabled: the user can turn it off."""
    return os.environ.get(_NO_LOCKS) != "1"


@contextlib.contextmanager
def task_lock(folder: str | Path, task: int, *, timeout_s: float = 10) -> Iterator[None]:
    """Hold the lock of task number `task` of the job whose files are in `folder`, which is created if needed.

    Waits up to `timeout_s` for another holder to end (one that was killed may take a moment), then raises `TaskLocked`,
    which names the holder.

    The lock is flock(2) on `folder/.task_00003.lock`. The kernel releases it however its holder ends, so there are no
    stale locks. The file is kept, since removing it would let two processes lock two files of the same name. (A child
    that was forked without exec shares the lock, and keeps it while it lives.) Locking between machines depends on the
    file system: NFS needs version 4, or 3 with lockd, without the mount options `nolock` and `local_lock`; Lustre needs
    the mount option `flock`, its default since 2.13 (`localflock` only works within one machine). A file system without
    locks causes a UserError, unless MEGATRON_TPT_NO_LOCKS=1 turns locking off.
    """
    with exclusive(_task_lock_path(folder, task), f"task {task}", timeout_s=timeout_s):
        yield


def is_task_locked(folder: str | Path, task: int) -> bool:
    """Whether a process holds the `task_lock`, here or on another machine; False without locks."""
    path = _task_lock_path(folder, task)
    if not has_locks() or not path.exists():
        return False
    with open(path, "a+", opener=no_links) as file:
        return not _try_lock(file.fileno(), path)  # released at once; a task that starts meanwhile waits briefly


def _task_lock_path(folder: str | Path, task: int) -> Path:
    return Path(folder) / f".task_{task:05d}.lock"


@contextlib.contextmanager
def exclusive(path: Path, what: str, *, timeout_s: float) -> Iterator[None]:
    """Hold the lock file `path`; `what` names the protected resource in messages. See `task_lock`."""
    if not has_locks():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opening must not truncate it: it names the holder. Opened for writing, since NFS requires it for locking.
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
            unlock_descriptor(file.fileno())  # closing is not enough: a forked child may have it open as well


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
