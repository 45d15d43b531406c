"""The folder of a job: its settings, and the state and progress of its tasks.

    FOLDER/NAME.json                                  the settings, written first; a run with other settings is refused
    FOLDER/.work/locks/.task_00003.lock               held while task 3 is running
    FOLDER/.work/progress/task-00003-of-00064.json    its progress
    FOLDER/.work/finished/task-00003-of-00064         written when its share is done
    FOLDER/logs/                                      output of tasks that another process runs

A task is running while it holds its lock, finished when it has completed its share, failed when its last run ended with
an error code, and stopped when it was killed (or runs without locks, see `task_lock`). All other tasks are waiting, in
SLURM's queue or to be started.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_tpt.jobs.lock import is_task_locked, task_lock
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.jobs.progress import every
from megatron_tpt.jobs.report import TaskFiles, TaskReport
from megatron_tpt.jobs.run import run_tasks
from megatron_tpt.jobs.settings import (
    added_names,
    check_settings,
    describe_names,
    in_job_order,
    require_apart,
    write_settings,
)
from megatron_tpt.records import Source, expand_sources

logger = logging.getLogger(__name__)

WORK = ".work"
"""The folder in the output for internal state; hidden, so that it is not read as records."""
_STATUS_EVERY_S = 30.0

TaskState = Literal["running", "waiting", "stopped", "failed", "finished"]


class JobFolder:
    """The files that a job keeps in its output folder besides its results."""

    def __init__(self, folder: Path, settings_name: str) -> None:
        self.folder = folder
        self.settings_path = folder / settings_name
        self.logs = folder / "logs"
        self.locks = folder / WORK / "locks"
        self.progress = folder / WORK / "progress"
        self.finished = folder / WORK / "finished"

    def sources(self, inputs: Sequence[str | Path]) -> list[Source]:
        """The sources that `inputs` name, in the order of the job (see `in_job_order`). Raises UserError if they
        overlap with the folder."""
        sources = expand_sources(inputs)
        require_apart(self.folder, inputs, [source.path for source in sources if source.path])
        return in_job_order(self.settings_path, sources)

    def begin(self, settings: dict[str, Any]) -> None:
        """Record the settings of a job that starts, or its grown input, which reopens all of its tasks.

        Raises UserError if the folder holds another job.
        """
        check_settings(self.settings_path, settings)
        if added := added_names(self.settings_path, settings):
            logger.info(f"{self.folder}: the input has grown, {describe_names(added, 'added')}")
            for note in self.finished.glob("*"):
                note.unlink(missing_ok=True)
        write_settings(self.settings_path, settings)

    def task_lock(self, task: int) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of a task, see `lock.task_lock`."""
        return task_lock(self.locks, task)

    def launch(
        self, command: Sequence[str], options: ScaleOptions, status: Callable[[], str] | None = None
    ) -> TaskReport:
        """Run `command` as its tasks, see `run_tasks`; every half minute prints `status`, by default the number of
        tasks in each state."""

        def states() -> str:
            return f"tasks: {count_states(self.states(options.num_tasks))}"

        with every(_STATUS_EVERY_S, lambda: logger.info((status or states)())):
            return run_tasks(command, options, self.logs)

    def progress_path(self, task: int, num_tasks: int) -> Path:
        """The progress file of task `task` of `num_tasks`."""
        return self.progress / f"{task_name(task, num_tasks)}.json"

    def note_finished(self, task: int, num_tasks: int) -> None:
        """Record that task `task` has finished its share."""
        self.finished.mkdir(parents=True, exist_ok=True)
        (self.finished / task_name(task, num_tasks)).touch()

    def note_reopened(self, task: int, num_tasks: int) -> None:
        """Record that task `task` has work again; so may all tasks of other splits."""
        for path in self.finished.glob("*-of-*"):
            if path.name == task_name(task, num_tasks) or path.name.rpartition("-")[2] != f"{num_tasks:05d}":
                path.unlink(missing_ok=True)

    def unfinished_tasks(self, num_tasks: int) -> list[int]:
        """The tasks of `num_tasks` that have not finished; none if all tasks of another split have."""
        names = {path.name for path in self.finished.glob("*-of-*")}
        splits = {int(name.rpartition("-")[2]) for name in names}
        if any(all(task_name(task, split) in names for task in range(split)) for split in splits):
            return []
        return [task for task in range(num_tasks) if task_name(task, num_tasks) not in names]

    def running_tasks(self) -> list[int]:
        """The tasks of any split that hold their lock now."""
        numbers = [int(path.stem.rpartition("_")[2]) for path in sorted(self.locks.glob(".task_*.lock"))]
        return [number for number in numbers if is_task_locked(self.locks, number)]

    def states(self, num_tasks: int) -> list[TaskState]:
        """The state of each of `num_tasks` tasks."""
        unfinished = set(self.unfinished_tasks(num_tasks))
        return [self._state(task, num_tasks, is_finished=task not in unfinished) for task in range(num_tasks)]

    def _state(self, task: int, num_tasks: int, *, is_finished: bool) -> TaskState:
        if is_task_locked(self.locks, task):
            return "running"
        if is_finished:
            return "finished"
        if TaskFiles(self.logs, task).read_exit_code():
            return "failed"
        return "stopped" if self.progress_path(task, num_tasks).exists() else "waiting"

    def latest_split(self) -> int:
        """The number of tasks of the run that reported progress last."""
        paths = sorted(self.progress.glob("task-*-of-*.json"), key=lambda path: path.stat().st_mtime_ns)
        return int(paths[-1].stem.rpartition("-")[2]) if paths else 1


def task_name(task: int, num_tasks: int) -> str:
    """The name of the files of task `task` of `num_tasks`."""
    return f"task-{task:05d}-of-{num_tasks:05d}"


def count_states(states: Sequence[TaskState]) -> str:
    """As in "2 running, 1 waiting"."""
    number = Counter(states)
    order: tuple[TaskState, ...] = ("running", "waiting", "stopped", "failed", "finished")
    return ", ".join(f"{number[state]:,} {state}" for state in order if number[state])


class Share(NamedTuple):
    """The part of a job's input that belongs to one task: whole sources if there are enough of them (then tasks read
    disjoint files), otherwise every num_tasks-th block of each source."""

    task: int
    num_tasks: int
    num_sources: int

    @property
    def has_whole_sources(self) -> bool:
        """Whether tasks do not share sources."""
        return self.num_sources >= self.num_tasks

    @property
    def fraction(self) -> float:
        """The fraction of the sources that it reads which is its own."""
        return 1.0 if self.has_whole_sources else 1 / self.num_tasks

    def of(self, sources: Sequence[Source]) -> list[tuple[int, Source]]:
        """The sources that the task has a share of, with their numbers."""
        numbered = list(enumerate(sources))
        return numbered[self.task :: self.num_tasks] if self.has_whole_sources else numbered

    def owns(self, source: int, block: int) -> bool:
        """Whether a block of a source belongs to the task."""
        turn = source if self.has_whole_sources else source + block
        return turn % self.num_tasks == self.task
