"""How far an offline job is: the states of its tasks (jobs/folder.py), and what these report."""

from collections import Counter
from pathlib import Path
from typing import Any

from megatron_tpt.jobs.folder import WORK, JobFolder, TaskState
from megatron_tpt.jobs.report import TaskFiles
from megatron_tpt.monitoring.state import State, Status, modified, read_fields
from megatron_tpt.names import counted

_MAX_FAILURES = 5


def is_job(folder: Path) -> bool:
    """Whether a folder is that of a job of tasks."""
    return any((folder / WORK / name).is_dir() for name in ("locks", "progress", "finished"))


def read_job(folder: Path, now: float) -> Status:
    """How far a job is at `now`, in seconds since 1970."""
    job = JobFolder(folder, "")
    num_tasks = _num_tasks(job)
    states = job.states(num_tasks)
    paths = [job.progress_path(task, num_tasks) for task in range(num_tasks)]
    reports = [read_fields(path) for path in paths]
    running = [report for state, report in zip(states, reports, strict=True) if state == "running"]
    whole, done = (sum(report.get(name, 0) for report in reports) for name in ("input_bytes", "input_bytes_done"))
    bytes_per_s = sum(_per_s(report, "input_bytes_answered") for report in running)
    signs = [sign for path in paths if (sign := modified(path)) is not None]
    return Status(
        folder=folder,
        kind="job",
        state=_state(states),
        share=min(1.0, done / whole) if whole else None,
        tokens_per_s=sum(_per_s(report, "thinking_tokens") for report in running) or None,
        remaining_s=(whole - done) / bytes_per_s if bytes_per_s and done < whole else None,
        heartbeat_age_s=max(0.0, now - max(signs)) if signs else None,
        tasks=dict(Counter(states)),
        warnings=_failures(job, states),
    )


def _num_tasks(job: JobFolder) -> int:
    """Of the run that reported or finished something last; tasks that hold their locks belong to it, too."""
    paths = [*job.progress.glob("task-*-of-*.json"), *job.finished.glob("task-*-of-*")]
    splits = {int(path.stem.rpartition("-")[2]): _written(path) for path in sorted(paths, key=_written)}
    latest = max(splits, key=lambda split: splits[split], default=1)
    return max([latest, *(task + 1 for task in job.running_tasks())])


def _written(path: Path) -> float:
    return modified(path) or 0.0


def _state(states: list[TaskState]) -> State:
    """Of the whole job: what any of its tasks is doing, the most urgent first."""
    if set(states) == {"finished"}:
        return "finished"
    order: tuple[tuple[TaskState, State], ...] = (
        ("running", "running"),
        ("failed", "failed"),
        ("stopped", "stopped"),
        ("waiting", "waiting"),
    )
    return next(whole for one, whole in order if one in states)


def _per_s(report: dict[str, Any], name: str) -> float:
    """What a task that generates has done in a second, since its engine was ready."""
    seconds = report.get("generation_s") or 0.0
    return report.get(name, 0) / seconds if seconds else 0.0


def _failures(job: JobFolder, states: list[TaskState]) -> list[str]:
    failed = [task for task, state in enumerate(states) if state == "failed"]
    lines = []
    for task in failed[:_MAX_FAILURES]:
        files = TaskFiles(job.logs, task)
        lines.append(f"task {task} failed with exit code {files.read_exit_code()}: {files.user_error()}")
    more = len(failed) - _MAX_FAILURES
    return [*lines, f"{counted(more, 'more task')} failed: see {job.logs}"] if more > 0 else lines
