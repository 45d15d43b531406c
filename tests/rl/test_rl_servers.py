"""Whole runs whose rollouts are sampled by real vLLM servers: a server of each rank, or one for all ranks."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from ports import free_port
from rl_runs import make_problems, make_start, rl_recipe, write_recipe
from running_servers import newest_server
from training_runs import Workers, read_metrics

pytestmark = pytest.mark.slow(minutes=3)
PROGRAM = "megatron_tpt.rl.__main__"
ROLLOUTS: dict[str, Any] = {"max_new_tokens": 14, "prompts_per_wave": 2, "max_num_seqs": 16}


@pytest.fixture(scope="module")
def workers() -> Workers:
    return Workers()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_problems(tmp_path_factory.mktemp("problems") / "problems.jsonl")


def recipe_of(start: Path, problems: Path, folder: Path, **rollouts: Any) -> Path:
    training = {"sequence_length": 32}
    return write_recipe(rl_recipe(start, problems, folder, training=training, rollouts=ROLLOUTS | rollouts))


def assert_followed(run: Path) -> None:
    """Every iteration sampled with the trainer's weights."""
    rows = [row for row in read_metrics(run) if "reward" in row]
    assert len(rows) == 2 and all(0 < row["mismatch/gap_max"] < 1e-4 for row in rows)
    [folder] = (run / "engine-weights").iterdir()
    assert folder.name == "version_00000002"


@pytest.mark.parametrize(("num_processes", "program"), [(1, PROGRAM), (2, PROGRAM), (1, "failing_rl")])
def test_a_server_of_each_rank_follows_the_trainer(
    num_processes: int, program: str, workers: Workers, start: Path, problems: Path, tmp_path: Path
) -> None:
    """Also where it is killed in the first wave of the second iteration, call 5 after two of probes in each wave."""
    recipe = recipe_of(start, problems, tmp_path / "run", engine="vllm-server")
    options = ["--fail=0:5"] if program == "failing_rl" else []
    workers.run(program, [str(recipe), *options], num_processes)
    assert_followed(tmp_path / "run")


class Served:
    """`python -m megatron_tpt.rl.serve`, started again whenever it ends."""

    def __init__(self, port: int, recipe: Path, log: Path) -> None:
        self._command = [sys.executable, "-m", "megatron_tpt.rl.serve", str(port), str(recipe)]
        self._log, self._is_over, self.num_starts = log, threading.Event(), 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._is_over.is_set():
            self.num_starts += 1
            with self._log.open("ab") as log:
                self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
            self.process.wait()

    def __enter__(self) -> "Served":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._is_over.set()
        self.process.terminate()
        self._thread.join()


def test_one_server_for_all_ranks_follows_the_trainer_although_it_dies(
    workers: Workers, start: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    port = free_port()
    run = tmp_path / "run"
    recipe = recipe_of(start, problems, run, engine="endpoint", endpoints=[f"http://127.0.0.1:{port}/v1"])
    parts: list[psutil.Process] = []
    with Served(port, recipe, tmp_path / "server.log") as served:

        def kill() -> None:
            while not (run / "rollouts/iteration_00000000.json").exists():
                time.sleep(0.01)
            server = newest_server()
            parts.extend(server.children(recursive=True))
            server.kill()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        workers.run(PROGRAM, [str(recipe)], 2)
        killer.join()
        assert served.num_starts == 2
        assert parts and not any(part.is_running() for part in parts)
    assert_followed(run)
