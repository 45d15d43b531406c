"""One command as many tasks: on this machine, as a SLURM array, or on Ray.

A job that can be split takes `--task I --num-tasks N`, does part I of N, skips what is finished, and writes complete
files. `run_tasks(command, ScaleOptions(...), log_dir)` runs all its tasks and reports which finished:

- A task that fails or is killed does not stop other tasks; after a task ends with exit code 2 (the user can fix it), no
  further tasks are started.
- Running the same command again runs what is missing. No task runs twice at the same time.
- `LOG_DIR/task_00003.log` has the output of task 3, `task_00003.exit` its exit code.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_tpt.errors import UserError
from megatron_tpt.files import real_path
from megatron_tpt.jobs.local_tasks import run_local
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.jobs.ray_tasks import run_ray
from megatron_tpt.jobs.report import TaskFiles, TaskReport
from megatron_tpt.jobs.slurm_tasks import run_slurm

logger = logging.getLogger(__name__)

_EXECUTORS = {"local": run_local, "slurm": run_slurm, "ray": run_ray}


def run_tasks(
    command: Sequence[str],
    options: ScaleOptions,
    log_dir: str | Path,
    *,
    is_finished: Callable[[int], bool] = lambda task: False,
) -> TaskReport:
    """Run `command --task I --num-tasks N` for every task I that is not finished; call it from the main thread.

    `is_finished` says whether the results of a task exist. It should look at the job's output, since records of past
    runs would miss added input. Without it every task is started, and skips its work if it is done.

    On SLURM this returns once tasks are submitted (`options.wait` changes that); repeating the call submits those that
    are neither finished nor in the queue. The report is also printed. A task that ends with exit code 2 becomes a
    `UserError` with its message, once the tasks that were running have ended. On SIGTERM and Ctrl-C the tasks are
    stopped, then SystemExit or KeyboardInterrupt propagates.
    """
    folder = real_path(log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = _EXECUTORS[options.executor](list(command), options, folder, is_finished)
    report = TaskReport(sorted(results, key=lambda result: result.task))
    logger.log(logging.ERROR if report.exit_code else logging.INFO, report.summary())
    for result in report.failed:
        if result.exit_code == 2:
            raise UserError(f"task {result.task}: {TaskFiles(folder, result.task).user_error()}")
    return report
