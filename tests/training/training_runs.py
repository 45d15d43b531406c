"""Runs of the training programs: in processes forked from one that has imported all (quick), or started as a user
starts them (to kill)."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from ports import free_port

from megatron_tpt import logs

Train = Callable[..., list[dict]]
PRETRAIN, FINETUNE = "megatron_tpt.pretrain", "megatron_tpt.finetune"


def start_training(
    recipe_path: Path, *overrides: str, num_processes: int = 1, program: str = PRETRAIN
) -> subprocess.Popen:
    """Start pre-training from the command line. Its output is one text stream."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command = [sys.executable, *(launcher if num_processes > 1 else []), "-m", program, str(recipe_path), *overrides]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def environments(num_processes: int, ranks_per_node: int | None = None) -> list[dict[str, str]]:
    """The environment of each rank, as a launcher sets it on one machine, or on machines of `ranks_per_node`."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_processes)}
    local_ranks = [rank % (ranks_per_node or num_processes) for rank in range(num_processes)]
    return [
        {**os.environ, **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(local_rank)}
        for rank, local_rank in enumerate(local_ranks)
    ]


def start_ranks(program: str, recipe_path: Path, *overrides: str, num_processes: int) -> list[subprocess.Popen]:
    """Start the ranks of a run as srun does: no launcher ends one when another ends."""
    command = [sys.executable, "-m", program, str(recipe_path), *overrides]
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=Path(__file__).parent,
        )
        for environment in environments(num_processes)
    ]


def finish(process: subprocess.Popen) -> str:
    """Wait for a program that must succeed."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def read_metrics(run_folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def _work(connection: Connection, module: str, argv: list[str], environment: dict[str, str]) -> None:
    """Be one rank of a run: send what it printed, and why it failed if it did."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *argv]
    logs.configure()
    output, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(output):
            importlib.import_module(module).main()
    except BaseException as exception:
        error = f"{exception!r}\n{traceback.format_exc()}"
    connection.send((error, output.getvalue()))


class Workers:
    """Starts the ranks of runs quickly: new processes, forked from one that has imported torch and Megatron Core."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            [
                "megatron_tpt.training.builder",
                "megatron_tpt.training.pretrain_data",
                "megatron_tpt.models.gpt.build",
                "torch._dynamo",
            ]
        )

    def run(self, module: str, argv: list[str], num_processes: int, *, ranks_per_node: int | None = None) -> str:
        """Run a program on that many ranks. Returns what the first printed; fails when any rank does.

        With `ranks_per_node` they act as several machines, and `{node}` in an argument is the number of the machine.
        """
        started = []
        for rank, environment in enumerate(environments(num_processes, ranks_per_node)):
            node = rank // (ranks_per_node or num_processes)
            own_argv = [argument.replace("{node}", str(node)) for argument in argv]
            ours, theirs = self.context.Pipe()
            # Not a daemon: Megatron Core's checkpoint writer starts a process.
            process = self.context.Process(target=_work, args=(theirs, module, own_argv, environment))
            process.start()
            theirs.close()
            started.append((process, ours))
        try:
            results = [_result_of(process, connection) for process, connection in started]
        finally:  # where a test has been ended, ranks may wait for each other
            for process, _ in started:
                process.kill()
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(results) if error]
        errors.sort(key=lambda error: "another rank has ended" not in error)  # the cause last: it is read first
        assert not errors, "\n".join(errors)
        return results[0][1]

    def run_and_kill(self, module: str, argv: list[str], is_due: Callable[[], bool]) -> None:
        """Run a program on one rank, and kill -9 it and its processes when `is_due`. Fails when it ends before that."""
        [environment] = environments(1)
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_work, args=(theirs, module, argv, environment))
        process.start()
        theirs.close()
        while not is_due():
            assert not ours.poll(), f"ended too early: {_result_of(process, ours)}"
            time.sleep(0.002)
        own = psutil.Process(process.pid)
        for one in [own, *own.children(recursive=True)]:
            one.kill()
        process.join()


def _result_of(process: BaseProcess, connection: Connection) -> tuple[str | None, str]:
    """Why a rank failed, None if it did not, and what it printed."""
    try:
        error, output = connection.recv()
    except EOFError:
        error, output = "has sent no result", ""
    process.join()
    if process.exitcode:
        error = f"ended with code {process.exitcode}: {error}"
    return error, output
