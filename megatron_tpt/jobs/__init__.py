"""One command as many tasks: on this machine, as a SLURM array, or on Ray.

A job that can be split takes `--task I --num-tasks N` and does part I of N, skips what is finished, and writes whole
files. `run_tasks(command, ScaleOptions(...), log_dir)` runs all its tasks and says which finished:

- A task that fails or is killed stops no other; a task that ends with exit code 2 (the user can mend it) stops the
  start of further ones.
- The same command again runs what is missing. No task runs twice at once.
- `LOG_DIR/task_00003.log` is what task 3 printed, `task_00003.exit` its exit code.
"""

from megatron_tpt.jobs.lock import TaskLocked, is_task_locked, locked, task_lock
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.jobs.report import TaskFiles, TaskReport, TaskResult
from megatron_tpt.jobs.run import run_tasks

__all__ = [
    "ScaleOptions",
    "TaskFiles",
    "TaskLocked",
    "TaskReport",
    "TaskResult",
    "is_task_locked",
    "locked",
    "run_tasks",
    "task_lock",
]
