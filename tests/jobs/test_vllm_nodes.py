"""slurm/train.sbatch on a real SLURM of two nodes: one trains, the other serves vLLM, whose server is killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from ports import free_port
from slurm_cluster import slurm_cluster
from toy_runs import wait_until

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 900
sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("rl", "training")]

from rl_runs import make_problems, make_start, rl_recipe, write_recipe  # noqa: E402


@pytest.mark.slow(minutes=4)
@pytest.mark.timeout(2 * PATIENCE_S)
def test_the_last_node_samples_for_those_that_train(tmp_path: Path) -> None:
    problems, port = make_problems(tmp_path / "problems.jsonl"), free_port()
    changes = {"training": {"sequence_length": 32}, "rollouts": {"max_new_tokens": 14, "max_num_seqs": 16}}
    recipe = write_recipe(rl_recipe(make_start(tmp_path / "start"), problems, tmp_path / "run", **changes))
    command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/log.txt"]
    command += ["slurm/train.sbatch", "rl", str(recipe)]
    variables = {"PYTHON": sys.executable, "LOGS": str(tmp_path), "MAX_FAULTS": "0", "VLLM_NODES": "1"}
    variables |= {"VLLM_PORT": str(port), "BAD_NODES": str(tmp_path / "bad-nodes.txt")}
    with slurm_cluster(num_cpus=2, num_nodes=2):
        done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        job, files = done.stdout.strip(), tmp_path / f"train-{done.stdout.strip()}"

        def state() -> str:
            shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
            return dict(word.partition("=")[::2] for word in shown.split() if "=" in word)["JobState"]

        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        first = tmp_path / "run/rollouts/iteration_00000000.json"
        wait_until(lambda: first.exists() or state() in ended, timeout_s=PATIENCE_S)
        log, served = (tmp_path / "log.txt"), files / "server-0-node2.txt"
        assert first.exists(), log.read_text() + (served.read_text() if served.exists() else "")
        [keeper, server] = sorted(
            (one for one in psutil.process_iter() if f"--port {port}" in " ".join(_command(one))),
            key=psutil.Process.create_time,
        )
        parts = server.children(recursive=True)
        server.kill()
        wait_until(lambda: state() in ended, timeout_s=PATIENCE_S)
        assert state() == "COMPLETED", log.read_text() + served.read_text()
        assert parts and not any(part.is_running() for part in [keeper, *parts])
    assert "the server ended with code 137; it is started again" in served.read_text()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["mismatch/gap_max"] < 1e-4 for row in rows if "reward" in row] == [True, True]
    assert (files / "rank-00000-node1.txt").exists() and not (files / "rank-00001-node2.txt").exists()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
