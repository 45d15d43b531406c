"""slurm/train.sbatch on a real SLURM of two nodes, with two ranks on each."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster, slurm_cluster
from toy_runs import wait_until

REPOSITORY = Path(__file__).parents[2]
NUM_STEPS = 40
RECIPE = {
    "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 256},
    "data": {"mock": True},
    "training": {"num_steps": NUM_STEPS, "dtype": "float32", "sequence_length": 32, "global_batch_size": 4},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
    "logging": {"log_interval": 1, "tensorboard": False},
    "checkpoint": {"save_interval": 20},
}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
PATIENCE_S = 900
pytestmark = [pytest.mark.slow(minutes=1), pytest.mark.timeout(2 * PATIENCE_S)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with slurm_cluster(num_cpus=2, num_nodes=2) as cluster:
        yield cluster


class Job:
    """Pre-training on random tokens, which waits after the steps `hold` until `let_go`."""

    def __init__(self, folder: Path, *options: str, hold: tuple[int, ...] = (), **variables: str) -> None:
        self.folder, self.run, self.log = folder, folder / "run", folder / "log.txt"
        folder.mkdir(exist_ok=True)
        callbacks = {"hold:Hold": {"steps": list(hold), "folder": str(folder)}}
        recipe = RECIPE | {"run": {"output_dir": str(self.run)}, "callbacks": callbacks}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", f"--output={self.log}", *options]
        command += ["slurm/train.sbatch", "pretrain", str(folder / "recipe.yaml")]
        environment = os.environ | {"PYTHON": sys.executable, "MAX_FAULTS": "0", "LOGS": str(folder), **variables}
        environment |= {"BAD_NODES": str(folder / "bad-nodes.txt")}
        environment["PYTHONPATH"] = f"{Path(__file__).parent}:{environment.get('PYTHONPATH', '')}"
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()
        self.files = folder / f"train-{self.id}"

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def state(self) -> dict[str, str]:
        command = ["scontrol", "show", "job", self.id]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return dict(word.partition("=")[::2] for word in shown.split() if "=" in word)

    def losses(self) -> dict[int, float]:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return {line["step"]: line["loss"] for line in map(json.loads, lines)}

    def wait(self, what: str, condition) -> None:
        """Wait for something; the job must not end before it."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.state["JobState"] not in ENDED and time.monotonic() < deadline, f"no {what}:\n{self.text}"
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        self.wait(f"step {step}", lambda: step in self.losses())

    def let_go(self, step: int) -> None:
        (self.folder / f"go-{step}").touch()

    def set_limit_min(self, minutes: int) -> None:
        subprocess.run(["scontrol", "update", f"JobId={self.id}", f"TimeLimit={minutes}"], check=True)

    def wait_for_restart(self, count: int) -> None:
        self.wait(f"restart {count}", lambda: self.state["Restarts"] == str(count))

    def end(self) -> str:
        """Wait for the end; returns the state of the job and how often it was queued again."""
        wait_until(lambda: self.state["JobState"] in ENDED, timeout_s=PATIENCE_S)
        state = self.state
        return f"{state['JobState']} {state['ExitCode']}, {state['Restarts']} restarts"


@pytest.fixture(scope="module")
def unbroken(nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run on both nodes that nothing happens to."""
    job = Job(tmp_path_factory.mktemp("unbroken"))
    assert job.end() == "COMPLETED 0:0, 0 restarts", job.text
    return job


def test_each_rank_and_each_node_has_its_log_and_each_start_its_record(unbroken: Job) -> None:
    assert list(unbroken.losses()) == list(range(1, NUM_STEPS + 1))
    assert "2 nodes, 4 processes" in unbroken.text
    names = [f"rank-0000{rank}-node{1 + rank // 2}.txt" for rank in range(4)]
    assert sorted(path.name for path in unbroken.files.glob("rank-*")) == names
    assert f"finished: {NUM_STEPS} steps" in (unbroken.files / names[0]).read_text()
    start = unbroken.files / "start-0"
    assert "-m megatron_tpt.pretrain" in (start / "command.txt").read_text()
    assert yaml.safe_load((start / "recipe.yaml").read_text())["training"]["num_steps"] == NUM_STEPS
    for node in ("node1", "node2"):
        record = json.loads((start / f"environment-{node}.json").read_text())
        assert record["variables"]["SLURM_JOB_ID"] == unbroken.id and "torch" in record["packages"]
    (line,) = (unbroken.run / "starts.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert sum(record["processes"].values()) == 4 and "num_steps: 40" in record["recipe"] and record["step"] == 0


def test_a_run_whose_node_is_lost_is_queued_again_with_the_same_losses(
    nodes: Cluster, unbroken: Job, tmp_path: Path
) -> None:
    """Long before SLURM counts the node as lost, and without any retry, which could only fail."""
    # What SLURM could not send to the lost node it sends when that is back, soon here: that may kill the next ranks.
    job = Job(tmp_path, hold=(25,), WAIT_S="20", MAX_FAULTS="1")
    job.wait_for_step(25)
    nodes.lose_node("node2")
    job.let_go(25)
    job.wait("note on the node", lambda: "a node does not answer; the job is queued again" in job.text)
    nodes.start_node("node2")
    assert job.end() == "COMPLETED 0:0, 1 restarts", job.text
    before, _, after = job.text.partition("a node does not answer")
    assert before.count("the run ended with code 1") == 1 and "step_00000020 at step 20" in after, job.text
    assert job.losses() == unbroken.losses()


def test_a_run_that_meets_its_time_limit_again_and_again_has_the_same_losses(
    nodes: Cluster, unbroken: Job, tmp_path: Path
) -> None:
    """First that of SLURM itself, which looks every 30 s who has less than five minutes left, then its signal alone."""
    job = Job(tmp_path, "--time=60", hold=(10, 30))
    job.wait_for_step(10)
    hours, minutes, _ = map(int, job.state["RunTime"].split(":"))
    job.set_limit_min(60 * hours + minutes + 5)
    job.wait_for_restart(1)
    job.set_limit_min(60)
    job.wait_for_step(30)
    subprocess.run(["scancel", "--signal=USR1", job.id], check=True)
    assert job.end() == "COMPLETED 0:0, 2 restarts", job.text
    assert "stopped after step 11 (SIGUSR1)" in job.text and "stopped after step 31 (SIGUSR1)" in job.text
    assert job.losses() == unbroken.losses()


def test_files_in_the_run_folder_save_a_checkpoint_and_end_the_job_for_good(nodes: Cluster, tmp_path: Path) -> None:
    job = Job(tmp_path, hold=(5, 8))
    job.wait_for_step(5)
    (job.run / "save").touch()
    time.sleep(1.1)  # looked for once a second
    job.let_go(5)
    job.wait_for_step(8)
    checkpoints = sorted(path.name for path in (job.run / "checkpoints").glob("step_*"))
    assert checkpoints == ["step_00000006"] and not (job.run / "save").exists()
    (job.run / "stop").touch()
    time.sleep(1.1)
    job.let_go(8)
    assert job.end() == "FAILED 2:0, 0 restarts", job.text
    assert "stopped after step 9" in job.text and (job.run / "checkpoints/step_00000009").is_dir()


def test_a_cancelled_run_leaves_no_process_on_any_node(nodes: Cluster, tmp_path: Path) -> None:
    job = Job(tmp_path, hold=(5,))
    job.wait_for_step(5)
    pids = [json.loads(path.read_text())["pid"] for path in (job.run / "logs/heartbeats").glob("rank-*.json")]
    assert len(pids) == 4
    subprocess.run(["scancel", job.id], check=True)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), timeout_s=PATIENCE_S)
    assert job.end().startswith("CANCELLED")


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
    job = Job(tmp_path, SPARE_NODES="1")
    assert job.end() == "COMPLETED 0:0, 0 restarts", job.text
    assert f"left out: {a_bad_node}, which failed" in job.text
    assert sorted(path.name for path in job.files.glob("rank-*")) == ["rank-00000-node2.txt", "rank-00001-node2.txt"]
    assert (tmp_path / "bad-nodes.txt").read_text() == f"{a_bad_node}\n"


def test_a_node_that_fails_the_check_is_named_where_there_is_no_spare(
    nodes: Cluster, a_bad_node: str, tmp_path: Path
) -> None:
    job = Job(tmp_path)
    assert job.end() == "FAILED 2:0, 0 restarts", job.text
    assert f"error: {a_bad_node} failed the check above" in job.text and f"--exclude={a_bad_node}" in job.text
    assert not job.losses()
