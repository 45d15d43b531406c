"""Commands that depend on each other: on this machine, or as SLURM jobs with dependencies.

Each command is a task of its own (task 0 of 1, see task.py) with its own folder of logs, and starts once those before
it have ended. A command that fails stops only those after it. Under SLURM a command starts when those before it have
ended in any way, and finds out by itself whether they have succeeded: `afterok` would leave it in the queue forever.
"""

import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_tpt.errors import UserError
from megatron_tpt.jobs.local_tasks import ended, sigterm_as_exit, worker_environments
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.jobs.report import TaskFiles, TaskResult
from megatron_tpt.jobs.slurm_tasks import run_slurm, wait_for_jobs
from megatron_tpt.jobs.task import shell_exit_code, supervised_command

logger = logging.getLogger(__name__)

_POLL_S = 0.1


@dataclass(frozen=True)
class Node:
    """A command, and the commands that it needs."""

    name: str
    command: Sequence[str]
    """Gets `--task 0 --num-tasks 1` in addition."""
    log_dir: Path
    after: Sequence[str]
    """The names of the nodes that must have ended. Those that are in no node have finished before."""
    options: ScaleOptions
    """The resources of its job under SLURM."""


def run_graph(nodes: Sequence[Node], options: ScaleOptions) -> dict[str, TaskResult]:
    """Run all nodes, which stand behind those that they need; returns their results by name.

    On this machine `options.num_workers` run at once. On SLURM this returns once all are submitted, or with
    `options.wait` once none is in the queue. On SIGTERM and Ctrl-C the commands on this machine are stopped, then
    SystemExit or KeyboardInterrupt propagates; those on SLURM continue.
    """
    for node in nodes:
        node.log_dir.mkdir(parents=True, exist_ok=True)
    if options.executor == "ray":
        raise UserError("--executor ray: commands that depend on each other run on this machine (local) or on slurm")
    return _run_local(nodes, options) if options.executor == "local" else _submit(nodes, options)


def _run_local(nodes: Sequence[Node], options: ScaleOptions) -> dict[str, TaskResult]:
    free = worker_environments(options)
    waiting = {node.name: node for node in nodes}
    results: dict[str, TaskResult] = {}
    running: dict[str, tuple[Node, subprocess.Popen[bytes], dict[str, str]]] = {}
    with sigterm_as_exit(), _ended_at_exit(lambda: [process for _, process, _ in running.values()]):
        while waiting or running:
            _drop_blocked(waiting, results)
            for node in list(waiting.values()):
                if free and not any(name in waiting or name in running for name in node.after):
                    environment = free.pop(0)
                    running[node.name] = waiting.pop(node.name), _start(node, environment), environment
                    logger.info(f"{node.name}: started; log {TaskFiles(node.log_dir, 0).log}")
            for node, process, environment in list(running.values()):
                if (code := process.poll()) is not None:
                    del running[node.name]
                    free.append(environment)
                    results[node.name] = ended(0, shell_exit_code(code), node.log_dir)
                    _announce(node, results[node.name])
            time.sleep(_POLL_S)
    return results


def _start(node: Node, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    line = supervised_command(node.command, 1, node.log_dir, "--task", "0", "--parent", str(os.getpid()))
    # In its own process group: Ctrl-C only reaches this process, which then ends the commands.
    return subprocess.Popen(line, env=os.environ | environment, stdin=subprocess.DEVNULL, process_group=0)


def _drop_blocked(waiting: dict[str, Node], results: dict[str, TaskResult]) -> None:
    """Give a result to the nodes that need one that has not succeeded."""
    for node in list(waiting.values()):  # one behind another: a single pass finds all
        if any(name in results and results[name].state != "finished" for name in node.after):
            results[node.name] = TaskResult(0, "not run", TaskFiles(node.log_dir, 0).log)
            del waiting[node.name]


def _announce(node: Node, result: TaskResult) -> None:
    text = f"{node.name}: {result.describe()}"
    if result.state == "failed":
        text += f": {TaskFiles(node.log_dir, 0).user_error()}; log {result.log_path}"
    logger.log(logging.WARNING if result.state == "failed" else logging.INFO, text)


@contextmanager
def _ended_at_exit(processes: Callable[[], Sequence["subprocess.Popen[bytes]"]]) -> Iterator[None]:
    """Tell the supervisors of running commands to end them when the block is left, again at every Ctrl-C."""
    try:
        yield
    finally:
        while left := [process for process in processes() if process.poll() is None]:
            for process in left:
                process.terminate()
            try:
                for process in left:
                    process.wait()
            except KeyboardInterrupt:
                continue


def _submit(nodes: Sequence[Node], options: ScaleOptions) -> dict[str, TaskResult]:
    results: dict[str, TaskResult] = {}
    job_ids: list[str | None] = []
    for node in nodes:
        before = {results[name].job_id for name in node.after if name in results}
        if options.num_workers and len(job_ids) >= options.num_workers:
            # At most num_workers at once: a job also waits for the one num_workers places before it.
            before.add(job_ids[-options.num_workers])
        arguments = node.options.sbatch_args
        if waits_for := sorted((job_id for job_id in before if job_id is not None), key=int):
            arguments = [*arguments, f"dependency=afterany:{':'.join(waits_for)}"]
        scale = replace(node.options, executor="slurm", num_tasks=1, wait=False, sbatch_args=arguments)
        [result] = run_slurm(list(node.command), scale, node.log_dir, lambda task: False, is_quiet=True)
        logger.info(f"{node.name}: job {result.job_id}; log {result.log_path}")
        results[node.name] = result
        job_ids.append(result.job_id)
    if options.wait:
        wait_for_jobs({job_id for job_id in job_ids if job_id is not None})
        for node in nodes:
            code = TaskFiles(node.log_dir, 0).read_exit_code()
            # Without an exit code it was ended from outside.
            results[node.name] = ended(0, 1 if code is None else code, node.log_dir)
            _announce(node, results[node.name])
    return results
