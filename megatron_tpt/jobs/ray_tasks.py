"""Tasks on a Ray cluster.

(datatrove's RayPipelineExecutor runs each rank in a `multiprocess.Pool` of its actor, which waits forever when the
process of a rank is killed.)
"""

import logging
import os
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.jobs.local_tasks import announce, ended, tasks_to_run
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.jobs.report import TaskFiles, TaskResult
from megatron_tpt.jobs.task import supervised_command
from megatron_tpt.names import counted

logger = logging.getLogger(__name__)


def run_ray(
    command: Sequence[str], options: ScaleOptions, log_dir: Path, is_finished: Callable[[int], bool]
) -> list[TaskResult]:
    """Run the tasks that are not finished on Ray; returns all results.

    The nodes must share the current folder, `log_dir` and this Python environment. Ray itself restarts a task whose
    worker or node is lost, up to three times.
    """
    ray = _import_ray()
    tasks, results = tasks_to_run(options, log_dir, is_finished)
    if tasks:
        with ray.init(address=options.ray_address, log_to_driver=False):
            logger.info(f"{len(tasks)} of {counted(options.num_tasks, 'task')} to run on Ray; logs in {log_dir}")
            for result in _run(ray, command, options, log_dir, deque(tasks)):
                results[result.task] = result
    return list(results.values())


def _import_ray() -> Any:
    # Otherwise Ray sends usage statistics to its developers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError('Ray is not installed: pip install "megatron-tpt[ray]"') from error
    return ray


def _run(
    ray: Any, command: Sequence[str], options: ScaleOptions, log_dir: Path, waiting: deque[int]
) -> list[TaskResult]:
    folder = os.getcwd()

    @ray.remote(num_cpus=options.cpus_per_task or 1, num_gpus=options.gpus_per_task)
    def run_on_node(task: int) -> int:
        which = ["--task", str(task), "--parent", str(os.getpid())]
        line = supervised_command(command, options.num_tasks, log_dir, *which)
        return subprocess.run(line, cwd=folder, stdin=subprocess.DEVNULL, check=False).returncode

    running: dict[Any, int] = {}
    results: list[TaskResult] = []
    stopping = False
    try:
        while running or (waiting and not stopping):
            while waiting and not stopping and len(running) < (options.num_workers or len(waiting) + len(running)):
                task = waiting.popleft()
                running[run_on_node.remote(task)] = task
            [reference], _ = ray.wait(list(running))
            result = _result(ray, reference, running.pop(reference), log_dir)
            announce(result, options.num_tasks)
            results.append(result)
            stopping = stopping or result.exit_code == 2
    finally:
        # Cancelling kills a task's Ray worker; the supervisor that it started then ends the task.
        for reference in running:
            ray.cancel(reference, force=True)
    return results + [TaskResult(task, "not run", TaskFiles(log_dir, task).log) for task in waiting]


def _result(ray: Any, reference: Any, task: int, log_dir: Path) -> TaskResult:
    try:
        return ended(task, ray.get(reference), log_dir)
    except ray.exceptions.RayError as error:
        logger.warning(f"Ray lost task {task}: {error}")
        return TaskResult(task, "failed", TaskFiles(log_dir, task).log)
