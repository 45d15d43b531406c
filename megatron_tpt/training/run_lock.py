"""The lock of a run folder: only one job at a time runs in it.

    RUN/run.lock     the holder: host, process, SLURM job, since when

The lock does not need file system locks (NFS, Lustre, buckets), and a stale lock left by kill -9, a lost node or a
restarted machine does not prevent a resume:

- A holder on this machine is looked up by its process id and start time, so that a reused id is not mistaken for it.
- A holder that SLURM has requeued (same job, fewer restarts) has ended: SLURM ends a job before it restarts it.
- Any other holder touches the file regularly as a sign of life, for which a later job waits. The clocks of the
  machines are not used, since they may differ or jump.

A run whose lock has been taken over (because it was suspended for minutes, for example) ends at once and writes nothing
more.
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
"""A holder on another machine without a sign of life for this long is considered dead."""
_TAKEOVER_S = 30.0  # a takeover takes milliseconds


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """The start time of a process of this machine, in ticks since boot (so independent of the clock). None when there
    is no such process or it is a zombie, 0 when it exists but may not be inspected."""
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
    """The scope of process ids: this boot of this machine, and the container."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {_read_text('/proc/sys/kernel/random/boot_id')} {namespace}"


@dataclasses.dataclass(frozen=True)
class Holder:
    """The holder of a run folder."""

    host: str
    pid: int
    since: str
    machine: str = ""
    start: int = 0
    slurm_job: str = ""
    slurm_restarts: int = 0
    token: str = ""
    """Unique to each start of a run."""

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
        """Whether the holder is still running, if `newcomer` can tell without waiting; otherwise None."""
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
    """The holder (None if the file does not say) and a sign of life, which keeps changing while it is alive. None
    without a file."""
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
    """Write the lock file; False if it exists."""
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
    """Whether the holder of a lock shows a sign of life within `patience_s`."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience_s / 10))
        found = _read(path)
        if found is None or found[1] != sign:
            return found is not None
    return False


def _remove_stale(path: Path, holder: Holder | None, sign: tuple[int, int]) -> None:
    """Remove a stale lock, unless another has replaced it. One process at a time does so; others wait until it is done
    or has been killed."""
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
    """Write the lock `path` for `own`, replacing a stale one. Raises UserError if another job holds it."""
    while not _create(path, own):
        if (found := _read(path)) is None:
            continue
        holder, sign = found
        alive = holder.is_alive(own) if holder is not None else None
        if alive is None:
            logger.info(
                f"{path} is held by {holder or 'an unknown process'}: waiting up to {patience_s:.0f} s for a "
                "sign of life"
            )
            alive = _wait_for_life(path, sign, patience_s)
        if alive:
            raise UserError(
                f"run.output_dir={path.parent} is in use by {holder or 'an unknown process'}: wait for it, stop it, or "
                f"give another folder"
            )
        _remove_stale(path, holder, sign)


def _require_own(path: Path, own: Holder) -> None:
    """Give a sign of life. Ends the process if another job has taken the lock."""
    if _read(path) is None and _create(path, own):
        return  # someone has removed it manually
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
            with contextlib.suppress(OSError):  # a file system that is temporarily unavailable, or full
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
