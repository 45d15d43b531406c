"""slurm/train.sbatch on a real SLURM of two nodes, with two ranks on each, and slurm/pipeline.sh on them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster, slurm_cluster
from toy_runs import wait_until

REPOSITORY = Path(__file__).parents[2]
NUM_STEPS = 60
RECIPE = {
    "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 256},
    "data": {"mock": True},
    "training": {"num_steps": NUM_STEPS, "dtype": "float32", "sequence_length": 32, "global_batch_size": 4},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
    "logging": {"log_interval": 1, "tensorboard": False},
    "checkpoint": {"save_interval": 20},
}
pytestmark = pytest.mark.slow(minutes=1)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with slurm_cluster(num_cpus=2, num_nodes=2) as cluster:
        yield cluster


def submit(folder: Path, *options: str, num_nodes: int = 2, **variables: str) -> str:
    """Submit pre-training on random tokens in two processes per node. Returns the job's number."""
    recipe = RECIPE | {"run": {"output_dir": str(folder / "run")}}
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["sbatch", "--parsable", f"--nodes={num_nodes}", "--ntasks-per-node=2", f"--output={folder}/log.txt"]
    command += [*options, "slurm/train.sbatch", "pretrain", str(folder / "recipe.yaml")]
    environment = os.environ | {"PYTHON": sys.executable, "MAX_FAULTS": "1", **variables}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state_of(job: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return dict(word.partition("=")[::2] for word in shown.split() if "=" in word)


def wait_for_end(job: str) -> dict[str, str]:
    wait_until(lambda: state_of(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"))
    return state_of(job)


def metrics_of(folder: Path) -> list[dict]:
    path = folder / "run/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses_of(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics_of(folder)}


@pytest.fixture(scope="module")
def unbroken(nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of a run on both nodes that nothing happens to."""
    folder = tmp_path_factory.mktemp("unbroken")
    state = wait_for_end(submit(folder))
    text = (folder / "log.txt").read_text()
    assert state["JobState"] == "COMPLETED" and "2 nodes, 4 processes" in text, text
    losses = losses_of(folder)
    assert list(losses) == list(range(1, NUM_STEPS + 1))
    return losses


def test_a_run_whose_node_is_lost_is_queued_again_with_the_same_losses(
    nodes: Cluster, unbroken: dict[int, float], tmp_path: Path
) -> None:
    job = submit(tmp_path)
    wait_until(lambda: len(metrics_of(tmp_path)) >= 25)
    nodes.lose_node("node2")
    wait_until(lambda: state_of(job)["JobState"] == "PENDING")
    nodes.start_node("node2")
    state = wait_for_end(job)
    text = (tmp_path / "log.txt").read_text()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1") and "resumed from" in text, text
    assert losses_of(tmp_path) == unbroken


def test_a_run_that_meets_its_time_limit_again_and_again_has_the_same_losses(
    nodes: Cluster, unbroken: dict[int, float], tmp_path: Path
) -> None:
    # Signalled by hand, since SLURM counts a limit in minutes: the second time after the first restart.
    job = submit(tmp_path)
    for restarts, step in (("1", 10), ("2", 30)):
        wait_until(lambda step=step: len(metrics_of(tmp_path)) >= step)  # type: ignore[misc]
        subprocess.run(["scancel", "--signal=USR1", job], check=True)
        wait_until(lambda restarts=restarts: state_of(job)["Restarts"] == restarts)  # type: ignore[misc]
    state = wait_for_end(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), (tmp_path / "log.txt").read_text()
    assert losses_of(tmp_path) == unbroken


def test_a_cancelled_run_leaves_no_process_on_any_node(nodes: Cluster, tmp_path: Path) -> None:
    job = submit(tmp_path)
    wait_until(lambda: len(metrics_of(tmp_path)) >= 5)
    pids = [json.loads(path.read_text())["pid"] for path in (tmp_path / "run/logs/heartbeats").glob("rank-*.json")]
    assert len(pids) == 4
    subprocess.run(["scancel", job], check=True)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert wait_for_end(job)["JobState"] == "CANCELLED"


@pytest.fixture
def a_bad_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The check fails on this node, as if its environment were broken."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('SLURMD_NODENAME') == 'node1' and 'tools/check_env.py' in sys.orig_argv: os._exit(2)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
    return "node1"


def test_a_node_that_fails_the_check_is_left_out_where_there_is_a_spare(
    nodes: Cluster, a_bad_node: str, tmp_path: Path
) -> None:
    job = submit(tmp_path, SPARE_NODES="1")
    state, text = wait_for_end(job), (tmp_path / "log.txt").read_text()
    assert state["JobState"] == "COMPLETED" and f"left out: {a_bad_node}, which failed" in text, text
    assert len(list((tmp_path / "run/logs/heartbeats").glob("rank-*.json"))) == 2


def test_a_node_that_fails_the_check_is_named_where_there_is_no_spare(
    nodes: Cluster, a_bad_node: str, tmp_path: Path
) -> None:
    job = submit(tmp_path)
    state, text = wait_for_end(job), (tmp_path / "log.txt").read_text()
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0"), text
    assert f"error: {a_bad_node} failed the check above" in text and f"--exclude={a_bad_node}" in text
    assert not metrics_of(tmp_path)
