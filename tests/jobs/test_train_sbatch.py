"""slurm/train.sbatch on a real SLURM of one node, with two ranks on its cores."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy_runs import wait_until

from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.options import IndexOptions, TrainTokenizerOptions
from megatron_tpt.indexing.train_tokenizer import train_tokenizer
from megatron_tpt.records import Record, write_records

REPOSITORY = Path(__file__).parents[2]


def submit(folder: Path, *overrides: str, num_steps: int = 150) -> str:
    """Submit pre-training on random tokens, in two processes. Returns the job's number."""
    recipe = {
        "run": {"output_dir": str(folder / "run")},
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 256},
        "data": {"mock": True},
        "training": {"num_steps": num_steps, "dtype": "float32", "sequence_length": 32, "global_batch_size": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "logging": {"log_interval": 1, "tensorboard": False},
        "checkpoint": {"save_interval": 50},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--parsable", "--ntasks-per-node=2", f"--output={folder}/log.txt"]
    command = ["sbatch", *options, "slurm/train.sbatch", "pretrain", str(folder / "recipe.yaml"), *overrides]
    environment = {**os.environ, "PYTHON": sys.executable, "MAX_FAULTS": "1", "LOGS": str(folder)}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def read_job(job: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return dict(word.partition("=")[::2] for word in shown.split() if "=" in word)


def wait_for_end(job: str) -> dict[str, str]:
    wait_until(lambda: read_job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), timeout_s=300)
    return read_job(job)


def wait_for_step(folder: Path, step: int) -> dict:
    """Wait until that many steps are reported; returns the heartbeat of the second rank."""
    metrics = folder / "run/metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= step, timeout_s=300)
    return json.loads((folder / "run/logs/heartbeats/rank-00001.json").read_text())


@pytest.mark.slow
def test_a_run_is_requeued_when_signalled_to_stop_and_retried_after_a_fault(cluster: Path, tmp_path: Path) -> None:
    job = submit(tmp_path)
    wait_for_step(tmp_path, 3)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    log = tmp_path / "log.txt"
    wait_until(lambda: "resumed from" in log.read_text(), timeout_s=300)
    stopped_at = int(log.read_text().partition("stopped after step ")[2].split()[0])
    beat = wait_for_step(tmp_path, stopped_at + 3)
    os.kill(beat["pid"], signal.SIGKILL)
    state = wait_for_end(job)
    text = log.read_text()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), text
    assert "stopped with a checkpoint; the job is queued again" in text and f"job {job}, start 1" in text
    assert text.count("the run ended with code 137") == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 151))


@pytest.fixture
def index_prefix(tmp_path: Path) -> Path:
    """Documents of 2,400 tokens in all."""
    write_records(tmp_path / "records.jsonl", (Record(f"doc-{i}", "a b " * 12) for i in range(100)))
    tokenizer = train_tokenizer(
        TrainTokenizerOptions(input=[tmp_path / "records.jsonl"], output=tmp_path / "tokenizer", vocab_size=270)
    )
    index(IndexOptions(input=[tmp_path / "records.jsonl"], tokenizer=tokenizer, output=tmp_path / "corpus"))
    return tmp_path / "corpus"


@pytest.mark.parametrize("finder", ["every rank", "the first rank"])
def test_a_mistake_in_the_recipe_ends_the_job(finder: str, cluster: Path, tmp_path: Path, index_prefix: Path) -> None:
    """Also one that only the rank finds that opens the data for the others of its machine."""
    mistake, reported = ["--training.global_batch_size=3"], "error: training.global_batch_size=3 "
    if finder == "the first rank":
        source = f"{{path: {index_prefix}, max_epochs: 2}}"
        mistake = ["--data.mock=false", f"--data.train=[{source}]", "--model.vocab_size=270"]
        reported = f"error: data: {index_prefix} would be gone through "
    job = submit(tmp_path, *mistake)
    state = wait_for_end(job)
    text = (tmp_path / "log.txt").read_text()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0"), text
    assert text.count(reported) == 1 and "ended with code" not in text


@pytest.mark.slow
def test_a_fault_that_stays_is_tried_again_a_limited_number_of_times(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every rank ends like one whose machine is broken: with a code that no mistake has, and without a word.
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'RANK' in os.environ:\n    os._exit(1)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    job = submit(tmp_path)
    state = wait_for_end(job)
    text = (tmp_path / "log.txt").read_text()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "1:0", "0"), text
    assert text.count("the run ended with code 1") == 2
