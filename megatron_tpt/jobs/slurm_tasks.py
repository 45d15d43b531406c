"""Tasks as elements of a SLURM job array.

Element J of an array is always task `offset + J`, also after a requeue and beside arrays that were submitted later.
Each element runs `megatron_tpt.jobs.task` as its batch script, without srun: one process on one node needs no job step,
the signal before the time limit reaches it directly, and srun cannot apply different options.

(datatrove's SlurmPipelineExecutor keeps the list of ranks to run in one file that the next submission overwrites, so
that queued elements then run other ranks than they were submitted for. It submits a job that merges statistics and
waits forever if a task fails, and always sets a partition and the memory per core.)
"""

import hashlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write
from megatron_tpt.jobs.local_tasks import announce, finished_before
from megatron_tpt.jobs.lock import exclusive
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.jobs.report import TaskFiles, TaskResult
from megatron_tpt.jobs.task import supervised_command
from megatron_tpt.names import counted

logger = logging.getLogger(__name__)

_SCRIPT = """\
#!/bin/bash
# Submitted by: {submission}
set -e
{env_command}
exec {supervisor}
"""


@dataclass(frozen=True)
class _Element:
    """An element of one of the job's arrays in SLURM's queue."""

    task: int
    job_id: str
    state: str


def run_slurm(
    command: Sequence[str],
    options: ScaleOptions,
    log_dir: Path,
    is_finished: Callable[[int], bool],
    *,
    is_quiet: bool = False,
) -> list[TaskResult]:
    """Submit the tasks that are neither finished nor in the queue; returns all known results. With `is_quiet` the
    caller says which jobs these are."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH: submit from a machine of the SLURM cluster, or choose another executor")
    _require_one_line([*command, str(log_dir), *_sbatch_arguments(options, log_dir, "", "")])
    name = _job_name(command, log_dir)
    with exclusive(log_dir / "slurm" / ".submit.lock", f"a submission from {log_dir}", timeout_s=60):
        # In this order, so that a task that ends in between counts as finished, not as lost.
        queued = {element.task: element for element in _queued(name)}
        unfinished = [task for task in range(options.num_tasks) if not is_finished(task)]
        _check_same_job(command, options, log_dir, queued)
        missing = [task for task in unfinished if task not in queued]
        _tell_failures(missing, log_dir)
        job_ids = {element.task: element.job_id for element in queued.values()}
        for job_id, tasks in _submit(command, options, log_dir, name, missing):
            job_ids |= dict.fromkeys(tasks, job_id)
    waiting_for = sorted(set(job_ids.values()), key=int)
    if not is_quiet:
        _tell_queue(list(queued.values()), missing, waiting_for, options, log_dir)
    if options.wait and waiting_for:
        return _wait(name, unfinished, options, log_dir)
    unfinished_set = set(unfinished)
    return [
        TaskResult(task, "submitted", TaskFiles(log_dir, task).log, job_id=job_ids.get(task))
        if task in unfinished_set
        else finished_before(task, log_dir)
        for task in range(options.num_tasks)
    ]


def _require_one_line(words: Sequence[str]) -> None:
    """Raises UserError for a word that would end its line of the job script."""
    for word in words:
        if any(character < " " or character == "\x7f" for character in word):
            raise UserError(
                f"{word!r}: a line break or another control character cannot be part of a SLURM job's command, paths "
                f"or options: rename the file, or correct the option"
            )


def _job_name(command: Sequence[str], log_dir: Path) -> str:
    """A name that all submissions with one log folder share, by which their tasks are found in the queue."""
    script = next((Path(word).stem for word in command if word.endswith(".py")), Path(command[0]).stem)
    return f"{script}-{hashlib.sha256(str(log_dir).encode()).hexdigest()[:8]}"


def _queued(name: str) -> Iterator[_Element]:
    """Elements of the job's arrays that are pending, running or completing (as before a requeue)."""
    query = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F|%K|%t|%j"]
    for line in _slurm(query).splitlines():
        job_id, index, state, job_name = line.strip().split("|", 3)
        own_name, _, offset = job_name.rpartition("+")
        if own_name == name:
            yield _Element(int(offset) + int(index), job_id, state)


def _check_same_job(command: Sequence[str], options: ScaleOptions, log_dir: Path, queued: dict[int, _Element]) -> None:
    """Raise UserError while tasks of another job, or of another split of this one, are queued for its folder."""
    path = log_dir / "slurm" / "job.json"
    job = {"command": list(command), "num_tasks": options.num_tasks}
    if queued and path.exists() and json.loads(path.read_text()) != job:
        job_ids = " ".join(sorted({element.job_id for element in queued.values()}))
        raise UserError(
            f"the queue still holds tasks of another command or number of tasks with logs in {log_dir}: wait for them, "
            f"or end them with `scancel {job_ids}`"
        )
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(job, indent=1))


def _tell_failures(tasks: Sequence[int], log_dir: Path) -> None:
    for task in tasks:
        files = TaskFiles(log_dir, task)
        if code := files.read_exit_code():
            logger.warning(f"task {task} {TaskResult(task, 'failed', files.log, code).describe()} before: {files.log}")


def _submit(
    command: Sequence[str], options: ScaleOptions, log_dir: Path, name: str, tasks: Sequence[int]
) -> Iterator[tuple[str, list[int]]]:
    """Submit `tasks` in as few arrays as the cluster allows; yields the job id of each and its tasks."""
    if not tasks:
        return
    array_size = options.max_array_size or _max_array_size()
    previous = None
    for offset in range(0, options.num_tasks, array_size):
        indices = [task - offset for task in tasks if offset <= task < offset + array_size]
        if not indices:
            continue
        for index in indices:
            TaskFiles(log_dir, offset + index).exit_code.unlink(missing_ok=True)
        arguments = _sbatch_arguments(options, log_dir, f"{name}+{offset}", ranges(indices))
        if previous is not None and options.num_workers is not None:
            arguments.append(f"--dependency=afterany:{previous}")  # num_workers limits each array separately
        script = log_dir / "slurm" / f"tasks_{offset:05d}.sh"
        submission = ["sbatch", "--parsable", *arguments, str(script)]
        with atomic_write(script) as temporary:
            temporary.write_text(_script(command, options, log_dir, offset, submission))
        previous = _slurm(submission).strip().partition(";")[0]
        yield previous, [offset + index for index in indices]


def _script(command: Sequence[str], options: ScaleOptions, log_dir: Path, offset: int, submission: list[str]) -> str:
    which = ["--slurm-array-offset", str(offset), "--slurm-max-requeues", str(options.max_requeues)]
    return _SCRIPT.format(
        submission=shlex.join(submission),
        env_command=options.env_command or "",
        supervisor=shlex.join(supervised_command(command, options.num_tasks, log_dir, *which)),
    )


def _sbatch_arguments(options: ScaleOptions, log_dir: Path, name: str, indices: str) -> list[str]:
    values: dict[str, str | int | None] = {
        "job-name": name,
        "array": indices + (f"%{options.num_workers}" if options.num_workers else ""),
        # SLURM expands a single % in the folder's name too.
        "output": str(log_dir / "slurm").replace("%", "%%") + "/%A_%a.out",
        "open-mode": "append",
        "export": "ALL",
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": options.cpus_per_task,
        "gres": f"gpu:{options.gpus_per_task}" if options.gpus_per_task else None,
        "partition": options.partition,
        "time": options.time_limit,
        "account": options.account,
        "qos": options.qos,
        "mem": options.mem,
        # Sent to the batch script, which has exec'ed the supervisor.
        "signal": f"B:USR1@{options.requeue_before_limit_s}",
    }
    return [
        *(f"--{option}={value}" for option, value in values.items() if value is not None),
        "--requeue",
        *(f"--{argument}" for argument in options.sbatch_args),
    ]


def ranges(indices: Sequence[int]) -> str:
    """Sorted indices as sbatch reads them: [0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and parts[-1][1] == index - 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _max_array_size() -> int:
    for line in _slurm(["scontrol", "show", "config"]).splitlines():
        if line.startswith("MaxArraySize"):
            return int(line.partition("=")[2])
    raise UserError("the cluster does not report its MaxArraySize: set max_array_size")


def _slurm(command: list[str]) -> str:
    """The output of a SLURM command; a UserError with its message when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"SLURM refused: {message} ({shlex.join(command)})")
    return done.stdout


def _tell_queue(
    queued: Sequence[_Element], missing: Sequence[int], job_ids: Sequence[str], options: ScaleOptions, log_dir: Path
) -> None:
    if queued:
        num_pending = sum(element.state == "PD" for element in queued)
        logger.info(f"{counted(len(queued) - num_pending, 'task')} running and {num_pending:,} waiting already")
    if missing:
        logger.info(f"submitted {len(missing)} of {counted(options.num_tasks, 'task')}")
    if job_ids:
        logger.info(
            f"jobs {', '.join(job_ids)}: `squeue --job {','.join(job_ids)}`; logs: `tail -F {log_dir}/*.log`, and what "
            f"SLURM says in {log_dir}/slurm/*.out\nThe same command later submits what is missing by then."
        )


def wait_for_jobs(job_ids: Collection[str]) -> None:
    """Wait until none of these jobs of this user is in the queue."""
    query = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%F"]
    _poll_while(lambda: not set(_slurm(query).split()).isdisjoint(job_ids))


def _poll_while(is_queued: Callable[[], bool]) -> None:
    """Wait until no task is queued, polling less and less often."""
    interval_s = 0.5
    try:
        while is_queued():
            time.sleep(interval_s)
            interval_s = min(interval_s * 1.5, 30.0)
    except KeyboardInterrupt:
        logger.info("the tasks continue: the same command waits again, scancel ends them")
        raise


def _wait(name: str, tasks: Sequence[int], options: ScaleOptions, log_dir: Path) -> list[TaskResult]:
    """Wait until no task is queued; returns a result for every task of the job."""
    _poll_while(lambda: any(_queued(name)))
    results = {task: _result(task, log_dir) for task in tasks}
    for result in results.values():
        announce(result, options.num_tasks)
    return [results.get(task) or finished_before(task, log_dir) for task in range(options.num_tasks)]


def _result(task: int, log_dir: Path) -> TaskResult:
    files = TaskFiles(log_dir, task)
    code = files.read_exit_code()
    if not files.exit_code.exists():
        return TaskResult(task, "not run", files.log)
    return TaskResult(task, "finished" if code == 0 else "failed", files.log, code)
