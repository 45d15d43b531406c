"""The results of tasks."""

import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_tpt.names import counted

_NUM_LOG_LINES = 5
_MARK = "--- "


@dataclass(frozen=True)
class TaskFiles:
    """The files of one task in the log folder."""

    log_dir: Path
    task: int

    @property
    def log(self) -> Path:
        """The output of all runs of the task."""
        return self.log_dir / f"task_{self.task:05d}.log"

    @property
    def exit_code(self) -> Path:
        """The exit code of its last run; empty while it runs, and if it was stopped or lost; absent before any run."""
        return self.log_dir / f"task_{self.task:05d}.exit"

    def read_exit_code(self) -> int | None:
        """The exit code of its last run, or None."""
        text = self.exit_code.read_text() if self.exit_code.exists() else ""
        return int(text) if text else None

    def last_lines(self) -> list[str]:
        """The last lines of output of its last run."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, file.seek(0, 2) - 16384))
                lines = file.read().decode("utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        starts = [number for number, line in enumerate(lines) if line.startswith(f"{_MARK}start")]
        last_run = lines[starts[-1] + 1 :] if starts else lines
        return [line for line in last_run if line.strip() and not line.startswith(_MARK)][-_NUM_LOG_LINES:]

    def user_error(self) -> str:
        """The error message of its last run that says what the user has to change."""
        lines = self.last_lines()
        errors = [line for line in lines if line.startswith("error: ")]
        return errors[-1].removeprefix("error: ") if errors else " ".join(lines[-1:]) or f"see {self.log}"


def log_mark(event: str, text: str) -> bytes:
    """A marker line in the log of a task, for the start and the end of a run."""
    return f"{_MARK}{event} {text}\n".encode()


@dataclass(frozen=True)
class TaskResult:
    """The result of one task."""

    task: int
    """Number of the task, from 0."""
    state: Literal["finished", "failed", "submitted", "not run"]
    """`submitted`: waiting or running on SLURM; `not run`: never started, or stopped together with all other tasks."""
    log_path: Path
    """The output of the task."""
    exit_code: int | None = None
    """As in a shell: 137 means killed by signal 9. None if the task did not end, or nothing recorded how it ended."""
    job_id: str | None = None
    """SLURM: the job of a submitted task."""

    def describe(self) -> str:
        """The state in words."""
        if self.state != "failed":
            return self.state
        if self.exit_code is None:
            return "failed without an exit code"
        known = {int(each): each.name for each in signal.Signals}
        killed_by = known.get(self.exit_code - 128)
        return f"failed with exit code {self.exit_code}" + (f" ({killed_by})" if killed_by else "")


@dataclass(frozen=True)
class TaskReport:
    """The results of all tasks of a job, in their order."""

    results: Sequence[TaskResult]

    @property
    def failed(self) -> list[TaskResult]:
        """The tasks that failed."""
        return [result for result in self.results if result.state == "failed"]

    @property
    def exit_code(self) -> int:
        """The exit code for the program: 0 if every task finished or was submitted, otherwise 1."""
        return 0 if all(result.state in ("finished", "submitted") for result in self.results) else 1

    def summary(self) -> str:
        """The number of tasks in each state, then each failure with its log file and the last lines of the log."""
        counts = Counter(result.state for result in self.results)
        lines = [
            f"{counted(len(self.results), 'task')}: " + ", ".join(f"{count} {state}" for state, count in counts.items())
        ]
        for result in self.failed:
            lines.append(f"  task {result.task} {result.describe()}: {result.log_path}")
            files = TaskFiles(result.log_path.parent, result.task)
            lines += [f"      {line}" for line in files.last_lines()]
        if self.exit_code:
            lines.append("The same command again runs what is missing.")
        return "\n".join(lines)
