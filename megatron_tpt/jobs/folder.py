"""The folder of a job: its settings, which of its tasks run, how far each is, and which have finished.

    FOLDER/NAME.json                                  the settings, written first; a run with other settings is refused
    FOLDER/.work/locks/.task_00003.lock               held while task 3 runs
    FOLDER/.work/progress/task-00003-of-00064.json    how far it is
    FOLDER/.work/finished/task-00003-of-00064         written when its share is done
    FOLDER/logs/                                      what tasks printed, where another process runs them

A task is running while it holds its lock, finished when it came to the end of its share, failed when its last run ended
with an exit code, stopped when it was killed (or runs without locks, see `task_lock`); the others wait, in SLURM's
queue or to be started.
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
"""The folder in the output for what only the next run needs; hidden, so that it is not read as records."""
_STATUS_EVERY_S = 30.0

TaskState = Literal["running", "waiting", "stopped", "failed", "finished"]


class JobFolder:
    """What a job keeps in its output folder in addition to its results."""

    def __init__(self, folder: Path, settings_name: str) -> None:
        self.folder = folder
        self.settings_path = folder / settings_name
        self.logs = folder / "logs"
        self.locks = folder / WORK / "locks"
        self.progress = folder / WORK / "progress"
        self.finished = folder / WORK / "finished"

    def sources(self, inputs: Sequence[str | Path]) -> list[Source]:
        """What `inputs` name, in the order of the job (see `in_job_order`). Raises UserError where it overlaps with the
        folder."""
        sources = expand_sources(inputs)
        require_apart(self.folder, inputs, [source.path for source in sources if source.path])
        return in_job_order(self.settings_path, sources)

    def begin(self, settings: dict[str, Any]) -> None:
        """Note the settings of a job that starts, or that its input has grown: then none of its tasks has finished.

        Raises UserError where the folder holds another job.
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
        """Run `command` as its tasks, see `run_tasks`; says every half minute how far they are: `status`, or which of
        them run."""

        def states() -> str:
            return f"tasks: {count_states(self.states(options.num_tasks))}"

        with every(_STATUS_EVERY_S, lambda: logger.info((status or states)())):
            return run_tasks(command, options, self.logs)

    def progress_path(self, task: int, num_tasks: int) -> Path:
        """Where task `task` of `num_tasks` says how far it is."""
        return self.progress / f"{task_name(task, num_tasks)}.json"

    def note_finished(self, task: int, num_tasks: int) -> None:
        """Note that task `task` has finished its share."""
        self.finished.mkdir(parents=True, exist_ok=True)
        (self.finished / task_name(task, num_tasks)).touch()

    def note_reopened(self, task: int, num_tasks: int) -> None:
        """Note that task `task` has work again; whether those of other splits had is unknown."""
        for path in self.finished.glob("*-of-*"):
            if path.name == task_name(task, num_tasks) or path.name.rpartition("-")[2] != f"{num_tasks:05d}":
                path.unlink(missing_ok=True)

    def unfinished_tasks(self, num_tasks: int) -> list[int]:
        """The tasks of `num_tasks` that never finished; none when the tasks of another split all did."""
        names = {path.name for path in self.finished.glob("*-of-*")}
        splits = {int(name.rpartition("-")[2]) for name in names}
        if any(all(task_name(task, split) in names for task in range(split)) for split in splits):
            return []
        return [task for task in range(num_tasks) if task_name(task, num_tasks) not in names]

    def running_tasks(self) -> list[int]:
        """The tasks, of whatever split, that hold their lock now."""
        numbers = [int(path.stem.rpartition("_")[2]) for path in sorted(self.locks.glob(".task_*.lock"))]
        return [number for number in numbers if is_task_locked(self.locks, number)]

    def states(self, num_tasks: int) -> list[TaskState]:
        """The states of the tasks, if there are `num_tasks`."""
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
    """What the files of task `task` of `num_tasks` are called."""
    return f"task-{task:05d}-of-{num_tasks:05d}"


def count_states(states: Sequence[TaskState]) -> str:
    """As in "2 running, 1 waiting"."""
    number = Counter(states)
    order: tuple[TaskState, ...] = ("running", "waiting", "stopped", "failed", "finished")
    return ", ".join(f"{number[state]:,} {state}" for state in order if number[state])


class Share(NamedTuple):
    """The part of a job's input that one of its tasks has: whole sources where there are enough of them (then it reads
    nothing that another task reads), else blocks of each source in turn."""

    task: int
    num_tasks: int
    num_sources: int

    @property
    def has_whole_sources(self) -> bool:
        """Whether the task shares no source with another."""
        return self.num_sources >= self.num_tasks

    @property
    def fraction(self) -> float:
        """Of the sources that it reads, what is its own."""
        return 1.0 if self.has_whole_sources else 1 / self.num_tasks

    def of(self, sources: Sequence[Source]) -> list[tuple[int, Source]]:
        """The sources of which the task has a share, by their numbers."""
        numbered = list(enumerate(sources))
        return numbered[self.task :: self.num_tasks] if self.has_whole_sources else numbered

    def owns(self, source: int, block: int) -> bool:
        """Whether a block of a source is the task's."""
        turn = source if self.has_whole_sources else source + block
        return turn % self.num_tasks == self.task
