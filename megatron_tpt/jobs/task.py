"""Run one task of a job under supervision; all executors start tasks with it.

python -m megatron_tpt.jobs --log-dir LOGS --task 3 --num-tasks 16 -- COMMAND ...

- Runs `COMMAND ... --task 3 --num-tasks 16` with its output in LOGS/task_00003.log, and records its exit code.
- Holds the lock of the task meanwhile, so that a task that is started twice runs only once.
- Leaves no processes behind: on SIGTERM or SIGINT, or when the process that started this one has died (kill -9), the
  command and its children get SIGTERM, then SIGKILL 30 s later or at a second signal. Processes that the command leaves
  running when it ends are killed as well: an inference engine whose parent was killed would keep its GPU.
- Under SLURM, SIGUSR1 means that the time limit is near: the command is stopped as above and the task requeued. So is
  one that fails by itself within the last tenth of its time: a training run stops early to write its checkpoint.
"""

import argparse
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from megatron_tpt import logs
from megatron_tpt.errors import UserError, resource_message
from megatron_tpt.files import atomic_write, no_links
from megatron_tpt.jobs.lock import TaskLocked, task_lock
from megatron_tpt.jobs.report import TaskFiles, log_mark
from megatron_tpt.names import shown_lines
from megatron_tpt.processes import end_with_parent

logger = logging.getLogger(__name__)

GRACE_S = 30.0
"""From SIGTERM to SIGKILL."""
LOCKED_EXIT_CODE = 75
"""Another process is running the task (EX_TEMPFAIL of sysexits.h)."""
_LOCK_TIMEOUT_S = 120.0  # a run that lost its parent takes GRACE_S to end, the lock of a lost NFS client 90 s to expire
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


def supervised_command(command: Sequence[str], num_tasks: int, log_dir: Path, *which: str) -> list[str]:
    """The command line that runs one task under supervision; `which` are the options that say which task."""
    supervisor = [sys.executable, "-m", "megatron_tpt.jobs", *which]
    return [*supervisor, "--num-tasks", str(num_tasks), "--log-dir", str(log_dir), "--", *command]


def shell_exit_code(returncode: int) -> int:
    """The exit code of a process as a shell gives it: 128 + n when signal n ended it."""
    return 128 - returncode if returncode < 0 else returncode


def run_task(
    command: Sequence[str], task: int, log_dir: Path, *, lock_timeout_s: float = _LOCK_TIMEOUT_S
) -> tuple[int, signal.Signals | None]:
    """Run `command` as described above. Returns its exit code, and the signal because of which it was stopped, if any.

    If another process is running the task, waits up to `lock_timeout_s` for it to end, then raises TaskLocked.
    """
    files = TaskFiles(log_dir, task)
    with task_lock(log_dir, task, timeout_s=lock_timeout_s), open(files.log, "ab", buffering=0, opener=no_links) as log:
        # Signals are blocked and fetched with sigtimedwait, so that no handler interrupts other code.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS | {signal.SIGCHLD})
        with atomic_write(files.exit_code, durable=False):
            pass  # empty while the command runs
        place = f"{socket.gethostname()}, process {os.getpid()}" + _slurm_job()
        log.write(log_mark("start", f"{_now()} on {place}: {shlex.join(command)}"))
        returncode, stopped_by = _supervise(command, log)
        code = shell_exit_code(returncode)
        log.write(log_mark("end", f"{_now()} " + (f"stopped by {stopped_by.name}" if stopped_by else f"code {code}")))
        if stopped_by is None:
            with atomic_write(files.exit_code) as temporary:
                temporary.write_text(f"{code}\n")
    return code, stopped_by


def _supervise(command: Sequence[str], log: BinaryIO) -> tuple[int, signal.Signals | None]:
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_prepare_child,  # safe: this process has one thread
        )
    except OSError as error:
        log.write(f"error: cannot run {command[0]}: {error.strerror}\n".encode())
        return 2, None
    stopped_by = None
    deadline = float("inf")
    # The process stays a zombie until its whole group is killed, so that its pid cannot be reused before.
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        info = signal.sigtimedwait(_STOP_SIGNALS | {signal.SIGCHLD}, _remaining(deadline))
        if info is not None and info.si_signo in _STOP_SIGNALS:
            if stopped_by is None:
                stopped_by, deadline = signal.Signals(info.si_signo), time.monotonic() + GRACE_S
                os.killpg(process.pid, signal.SIGTERM)
            else:
                deadline = time.monotonic()
        if time.monotonic() >= deadline:
            os.killpg(process.pid, signal.SIGKILL)
            deadline = float("inf")
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait(), stopped_by


def _remaining(deadline: float) -> float:
    return min(max(deadline - time.monotonic(), 0.0), 3600.0)


def _prepare_child() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    end_with_parent(signal.SIGKILL)


def _tell_slurm(code: int, stopped_by: signal.Signals | None, max_requeues: int) -> None:
    """Requeue this element of the array, or cancel the pending ones, if necessary."""
    if stopped_by == signal.SIGUSR1 or (stopped_by is None and code not in (0, 2) and _is_near_time_limit()):
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= max_requeues:
            raise UserError(f"met the time limit {max_requeues + 1} times: raise time_limit, or max_requeues")
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    elif code == 2 and stopped_by is None:
        # Tasks that have not started yet would fail in the same way.
        subprocess.run(["scancel", "--state=PENDING", os.environ["SLURM_ARRAY_JOB_ID"]], check=True)


def _is_near_time_limit() -> bool:
    """Whether nine tenths of the time of this SLURM job are over. What fails for another reason fails again, and before
    that."""
    start, end = (float(os.environ.get(f"SLURM_JOB_{name}_TIME", "inf")) for name in ("START", "END"))
    return end < float("inf") and time.time() >= start + 0.9 * (end - start)


def _slurm_job() -> str:
    job, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f", job {job}_{index}" if job else ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron_tpt.jobs", description="Run one task under supervision.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", type=int)
    which.add_argument("--slurm-array-offset", type=int, help="the task is this plus the index in the SLURM array")
    parser.add_argument("--slurm-max-requeues", type=int, default=0)
    parser.add_argument("--parent", type=int, help="end when this process, which started us, is gone")
    parser.add_argument("--num-tasks", type=int, required=True)
    parser.add_argument("--log-dir", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    return parser


def _report(files: TaskFiles, text: str) -> None:
    """Write an error to the log of the task, or to stderr if the log cannot be written."""
    try:
        with open(files.log, "ab", opener=no_links) as log:
            log.write(f"error: {text}\n".encode())
    except OSError:
        logs.print_error(f"task {files.task}: {text}")


def main() -> int:
    """Run the task of the command line; returns the exit code of the process."""
    arguments = _parser().parse_args()
    if arguments.parent is not None:
        end_with_parent(signal.SIGTERM)
        if os.getppid() != arguments.parent:  # it had died before end_with_parent
            return 128 + signal.SIGTERM
    task, in_slurm = arguments.task, arguments.slurm_array_offset is not None
    if in_slurm:
        task = arguments.slurm_array_offset + int(os.environ["SLURM_ARRAY_TASK_ID"])
    command = [*arguments.command, "--task", str(task)]
    if not any(word.partition("=")[0] in ("--num-tasks", "--num_tasks") for word in command):
        command += ["--num-tasks", str(arguments.num_tasks)]
    try:
        logs.configure()
        code, stopped_by = run_task(command, task, arguments.log_dir)
        if in_slurm:
            _tell_slurm(code, stopped_by, arguments.slurm_max_requeues)
    except TaskLocked as error:
        logger.warning(f"not run: {error}")
        return LOCKED_EXIT_CODE
    except (UserError, OSError) as error:
        if (text := str(error) if isinstance(error, UserError) else resource_message(error)) is None:
            raise
        _report(TaskFiles(arguments.log_dir, task), shown_lines(text))
        return 2
    return 128 + stopped_by if stopped_by is not None else code
