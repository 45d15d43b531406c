"""Runs that are signalled to stop: the step is finished, a checkpoint written, and the same command resumes."""

import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml
from training_runs import Train, read_metrics, start_training

from megatron_tpt.training.stopping import stopping_time


def test_a_signal_to_all_processes_ends_the_step_with_a_checkpoint(recipe: dict, tmp_path: Path) -> None:
    """As srun sends it: to every process of the job, those that write checkpoints and read ahead among them."""
    changes = {
        "training": {**recipe["training"], "num_steps": 4000},
        "data": {**recipe["data"], "num_workers": 1},
    }
    path, run_folder = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({**recipe, **changes, "run": {"output_dir": str(run_folder)}}))
    process = start_training(path)
    metrics = run_folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.01)
    main = psutil.Process(process.pid)
    for one in [*main.children(recursive=True), main]:
        one.send_signal(signal.SIGUSR1)
    output, _ = process.communicate()
    assert process.returncode == 75, output
    last = read_metrics(run_folder)[-1]["step"]
    assert f"stopped after step {last} (SIGUSR1)" in output
    assert [path.name for path in (run_folder / "checkpoints").glob("step_*")] == [f"step_{last:08d}"]


def test_all_ranks_stop_at_the_time_limit_and_go_on_from_there(train: Train, tmp_path: Path) -> None:
    unbroken = train("unbroken", num_processes=2)
    with pytest.raises(AssertionError, match=r"StoppedEarly.*time limit"):
        train("run", "--run.time_limit_min=0", num_processes=2)
    steps = [m["step"] for m in read_metrics(tmp_path / "run")]
    assert steps == [1]
    assert [m["loss"] for m in train("run", num_processes=2)] == [m["loss"] for m in unbroken]


def test_the_margin_before_a_limit_leaves_most_of_a_short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert stopping_time(None, 5, 1000.0) is None
    assert stopping_time(120, 5, 1000.0) == 1000 + 115 * 60
    assert stopping_time(10, 5, 1000.0) == 1000 + 9 * 60
    monkeypatch.setenv("SLURM_JOB_END_TIME", "8200")
    assert stopping_time(None, 5, 1000.0) == 8200 - 300
    assert stopping_time(10, 5, 1000.0) == 1000 + 9 * 60
