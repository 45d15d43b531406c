"""The lock of a run folder: of two jobs that are started in one folder, only the first runs.

    RUN/run.lock     who has the folder: host, process, SLURM job, since when

The file needs no file system locks (NFS, Lustre, buckets), and no stale one left by kill -9, by a lost node
or by a restarted machine prevents a resume:

- A holder of this machine is looked up by its process number and start, so that a reused number is not mistaken for it.
- A holder that SLURM has requeued (same job, fewer restarts) has ended: SLURM ends a job before it starts it again.
- Any other holder shows life by touching the file. A later job watches whether it does; the clocks of the
machines,
  which may differ or jump, are not used.

A run that finds its lock taken over (it was suspended for minutes, say) ends at once and writes nothing more.
"""

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from megatron_tpt.errors import UserError

logger = logging.getLogger(__name__)

LOCK = "run.lock"
TOUCH_INTERVAL_S = 10.0
"""Seconds between signs of life."""
PATIENCE_S = 90.0
"""A holder elsewhere that shows no sign of life for this long has ended."""
_TAKEOVER_S = 30.0  # one takes milliseconds


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the machine's start (no clock is involved). None when there
    is none or only its exit code is left, 0 when it exists and may not be looked at."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's
        pass
    if not (fields := _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()):
        return 0
    return None if fields[0] in "ZX" else int(fields[19])


def _machine() -> str:
    """What process numbers belong to: this start of this machine, and the container."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {_read_text('/proc/sys/kernel/random/boot_id')} {namespace}"


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who has a run folder."""

    host: str
    pid: int
    since: str
    machine: str = ""
    start: int = 0
    slurm_job: str = ""
    slurm_restarts: int = 0
    token: str = ""
    """Different for every start of a run."""

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str] = os.environ) -> "Holder":
        """This process, from now on."""
        restarts = environment.get("SLURM_RESTART_COUNT", "0")
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=_machine(),
            start=_start_of(os.getpid()) or 0,
            slurm_job=environment.get("SLURM_JOB_ID", ""),
            slurm_restarts=int(restarts) if restarts.isdecimal() else 0,
            token=secrets.token_hex(8),
        )

    def is_alive(self, newcomer: "Holder") -> bool | None:
        """Whether the holder still runs, if `newcomer` can decide without waiting; None when it cannot."""
        if self.machine == newcomer.machine:
            start = _start_of(self.pid)
            return None if start == 0 else start is not None and start == self.start
        if self.slurm_job and self.slurm_job == newcomer.slurm_job and self.slurm_restarts < newcomer.slurm_restarts:
            return False
        return None

    def __str__(self) -> str:
        job = f" (SLURM job {self.slurm_job})" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"


def _read(path: Path) -> tuple[Holder | None, tuple[int, int]] | None:
    """The holder (None where the file does not say) and a sign of life, which changes while it lives. None without a
    file."""
    try:
        with path.open() as file:  # NFS asks the server again when a file is opened
            text, status = file.read(), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    except PermissionError:  # another user's, with a strict umask
        text, status = "", path.stat()
    sign = status.st_mtime_ns, status.st_ino
    try:
        return Holder(**json.loads(text)), sign
    except (ValueError, TypeError):
        return None, sign


def _create(path: Path, holder: Holder) -> bool:
    """Write the lock; False when there is one."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w") as file:
            file.write(json.dumps(dataclasses.asdict(holder)) + "\n")
    except OSError:  # no room
        path.unlink(missing_ok=True)
        raise
    return True


def _wait_for_life(path: Path, sign: tuple[int, int], patience_s: float) -> bool:
    """Whether the holder of a lock shows life within `patience_s`."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience_s / 10))
        found = _read(path)
        if found is None or found[1] != sign:
            return found is not None
    return False


def _remove_stale(path: Path, holder: Holder | None, sign: tuple[int, int]) -> None:
    """Remove the lock that was found stale, unless another has come in its place. One process
    at a time does so:
    others wait until that one is done or killed."""
    guard = path.with_name(f"{path.name}.takeover")
    try:
        os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        deadline = time.monotonic() + _TAKEOVER_S
        while guard.exists():
            if time.monotonic() > deadline:
                guard.unlink(missing_ok=True)
            time.sleep(0.05)
        return
    try:
        if _read(path) == (holder, sign):
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


def acquire(path: Path, own: Holder, *, patience_s: float = PATIENCE_S) -> None:
    """Write the lock `path` for `own`, in place of one whose holder has ended. Raises UserError if another has it."""
    while not _create(path, own):
        if (found := _read(path)) is None:
            continue
        holder, sign = found
        alive = holder.is_alive(own) if holder is not None else None
        if alive is None:
            logger.info(
                f"{path} is of {holder or 'an unknown process'}: waiting up to {patience_s:.0f} s for a sign of life"
            )
            alive = _wait_for_life(path, sign, patience_s)
        if alive:
            raise UserError(
                f"run.output_dir={path.parent} is in use by {holder or 'an unknown process'}: wait for it, stop it, or "
                f"give another folder"
            )
        _remove_stale(path, holder, sign)


def _require_own(path: Path, own: Holder) -> None:
    """Show life. Ends the process when the lock is another's."""
    if _read(path) is None and _create(path, own):
        return  # somebody has removed it by hand
    found = _read(path)
    if found is not None and found[0] is not None and found[0].token != own.token:
        logger.error(f"{path.parent} was taken over by {found[0]}: this run ends")
        os._exit(1)
    os.utime(path)


@contextlib.contextmanager
def run_lock(
    folder: Path, *, patience_s: float = PATIENCE_S, touch_interval_s: float = TOUCH_INTERVAL_S
) -> Iterator[None]:
    """Hold the lock of a run folder, for one `with` block. Raises UserError when another job holds it."""
    path, own, is_over = folder / LOCK, Holder.of_this_process(), threading.Event()
    acquire(path, own, patience_s=patience_s)

    def show_life() -> None:
        while not is_over.wait(touch_interval_s):
            with contextlib.suppress(OSError):  # a file system that is away for a while, or full
                _require_own(path, own)

    thread = threading.Thread(target=show_life, name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        if os.getpid() == own.pid:  # not in a fork
            is_over.set()
            thread.join()
            with contextlib.suppress(OSError):
                if (found := _read(path)) is not None and found[0] == own:
                    path.unlink()
