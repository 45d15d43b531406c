"""Runs of the training programs: in worker processes that stay (quick), or started as a user starts them (to kill)."""

import contextlib
import gc
import importlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

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


def start_ranks(program: str, recipe_path: Path, *overrides: str, num_processes: int) -> list[subprocess.Popen]:
    """Start the ranks of a run as srun does: no launcher ends one when another ends."""
    command = [sys.executable, "-m", program, str(recipe_path), *overrides]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_processes)}
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parent,
        )
        for rank in range(num_processes)
    ]


def finish(process: subprocess.Popen) -> str:
    """Wait for a program that must succeed."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def read_metrics(run_folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def _work(connection: Connection) -> None:
    """Run programs in this process, one after another: each job is a module, its arguments and torchrun's variables."""
    logs.configure()
    while True:
        try:
            module, argv, environment = connection.recv()
        except EOFError:
            return
        os.environ.update(environment)
        sys.argv = [module, *argv]
        output, error = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(output):
                importlib.import_module(module).main()
        except BaseException as exception:
            error = f"{exception!r}\n{traceback.format_exc()}"
        gc.collect()  # a trainer is in cycles; gloo's threads, which poll, live as long as its process groups
        connection.send((error, output.getvalue()))


class Workers:
    """Processes that have imported torch and Megatron Core once, and act as the ranks of one run after another."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []

    def _grow(self, num_processes: int) -> None:
        while len(self.connections) < num_processes:
            ours, theirs = self.context.Pipe()
            # Not a daemon: Megatron Core's checkpoint writer starts a process. It ends when we close the pipe.
            self.context.Process(target=_work, args=(theirs,)).start()
            theirs.close()
            self.connections.append(ours)

    def close(self) -> None:
        """Let the processes end."""
        for connection in self.connections:
            connection.close()
        self.connections.clear()

    def run(self, module: str, argv: list[str], num_processes: int, *, ranks_per_node: int | None = None) -> str:
        """Run a program on that many ranks. Returns what the first printed; fails when any rank does.

        With `ranks_per_node` they act as several machines, and `{node}` in an argument is the number of the machine.
        """
        self._grow(num_processes)
        port = free_port()
        for rank, connection in enumerate(self.connections[:num_processes]):
            node, local_rank = divmod(rank, ranks_per_node or num_processes)
            environment = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
            environment = {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
            connection.send((module, [argument.replace("{node}", str(node)) for argument in argv], environment))
        results = [connection.recv() for connection in self.connections[:num_processes]]
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(results) if error]
        assert not errors, "\n".join(errors)
        return results[0][1]
