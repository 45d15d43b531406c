"""Runs that are signalled to stop: the step is finished, a checkpoint written, and the same command resumes."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml
from training_runs import Train, read_metrics, start_training

from megatron_tpt.training.requests import Requests
from megatron_tpt.training.stopping import stopping_time


def saved_steps(run_folder: Path) -> list[int]:
    """Of the checkpoints in a run folder."""
    return sorted(int(path.name.removeprefix("step_")) for path in (run_folder / "checkpoints").glob("step_*"))


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


def test_files_in_the_run_folder_ask_for_a_checkpoint_and_for_a_stop(train: Train, tmp_path: Path) -> None:
    """The stop is in force until the file is removed: whatever starts the run again does not get far."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "save").touch()
    touching = {"touching:Touch": {"name": "stop", "step": 3}}
    with pytest.raises(AssertionError, match=r"UserError: stopped after step 4 \(.*run/stop is there: remove it"):
        train("run", changes={"callbacks": touching}, num_processes=2)
    assert saved_steps(run) == [1, 4]
    assert not (run / "save").exists() and (run / "stop").exists()
    with pytest.raises(AssertionError, match="run/stop asks this run to stop: remove it"):
        train("run")
    (run / "stop").unlink()
    assert [m["step"] for m in train("run")] == list(range(1, 21))
    assert saved_steps(run) == [1, 4, 20]


def test_a_request_is_seen_within_a_second_and_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    requests = Requests(tmp_path)
    assert requests.look() == (False, False)
    (tmp_path / "save").touch()
    clock[0] += 0.5
    assert requests.look() == (False, False) and (tmp_path / "save").exists()
    clock[0] += 0.6
    assert requests.look() == (False, True) and not (tmp_path / "save").exists()
    (tmp_path / "stop").touch()
    for _ in range(2):
        clock[0] += 1.1
        assert requests.look() == (True, False), "a stop stays"


def test_a_request_that_cannot_be_removed_is_obeyed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(time, "monotonic", iter(range(0, 1000, 10)).__next__)
    requests = Requests(tmp_path)
    (tmp_path / "save").touch()
    assert [requests.look().save for _ in range(3)] == [True, False, False]
    os.utime(tmp_path / "save", (1, 1))
    assert requests.look().save, "touched again"
