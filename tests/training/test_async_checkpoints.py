"""Checkpoints that are written during training: what they hold, and what faults leave of them."""

import os
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from training_runs import Train, Workers, read_metrics, start_training

EXACT = ("step", "loss", "grad_norm", "tokens")
ASYNCHRONOUS = [
    "--training.num_steps=12",
    "--checkpoint.save_interval=4",
    "--checkpoint.asynchronous=true",
    "--parallel.distributed_optimizer=false",  # whose weights are parts of buffers, which Megatron Core copies anyway
]
HELD = "held_pretrain"


def exact(metrics: list[dict]) -> list[list]:
    """A step that was skipped has no losses: None."""
    return [[m.get(name) for name in EXACT] for m in metrics if "grad_norm" in m]


def contents(run_folder: Path) -> dict[str, dict[str, list]]:
    """Weights and optimizer in every checkpoint of a run, as plain numbers."""
    found = {}
    for folder in (run_folder / "checkpoints").glob("step_*"):
        dcp_to_torch_save(folder, run_folder / "content.pt")
        state = torch.load(run_folder / "content.pt", weights_only=False)
        found[folder.name] = {name: value.tolist() for name, value in state.items() if isinstance(value, torch.Tensor)}
    return found


@pytest.fixture
def unbroken(train: Train) -> list[dict]:
    return train("unbroken", *ASYNCHRONOUS, "--checkpoint.asynchronous=false", num_processes=2)


def test_a_checkpoint_written_while_training_goes_on_holds_the_state_of_its_own_step(
    train: Train, unbroken: list[dict], tmp_path: Path, workers: Workers
) -> None:
    """Each is held until four steps later, when the next one is due, which has to wait for it."""
    held = train("run", *ASYNCHRONOUS, "--hold=4", "--checkpoint.keep_last=2", num_processes=2, program=HELD)
    assert exact(held) == exact(unbroken)
    expected = contents(tmp_path / "unbroken")
    assert any("exp_avg" in name for name in expected["step_00000008"])
    del expected["step_00000004"]
    assert contents(tmp_path / "run") == expected
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["latest", "step_00000008", "step_00000012"]


def test_a_writer_that_is_killed_costs_its_checkpoint_alone(
    train: Train, unbroken: list[dict], recipe: dict, tmp_path: Path, workers: Workers
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**recipe, "run": {"output_dir": str(tmp_path / "run")}}))
    output = workers.run(HELD, [str(path), *ASYNCHRONOUS, "--hold=kill:1:4"], 2)
    assert "step_00000004 could not be written (rank 1: " in output and "code -9" in output
    assert exact(read_metrics(tmp_path / "run")) == exact(unbroken)
    expected = contents(tmp_path / "unbroken")
    del expected["step_00000004"]
    assert contents(tmp_path / "run") == expected
    assert not list((tmp_path / "run/checkpoints").glob(".tmp-*"))


def test_a_run_killed_while_it_writes_leaves_whole_checkpoints_and_no_process(
    train: Train, recipe: dict, tmp_path: Path
) -> None:
    unbroken = train("unbroken", *ASYNCHRONOUS, "--checkpoint.asynchronous=false")
    path, run_folder = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({**recipe, "run": {"output_dir": str(run_folder)}}))
    process = start_training(path, *ASYNCHRONOUS, "--hold=never", program=HELD)
    note = run_folder / "writer-0-4"
    while process.poll() is None and not (note.exists() and note.read_text()):
        time.sleep(0.01)
    writer = psutil.Process(int(note.read_text()))
    process.kill()
    output, _ = process.communicate()
    writer.wait(60)
    (left,) = (run_folder / "checkpoints").iterdir()
    assert left.name.startswith(".tmp-step_00000004"), output
    train("run", *ASYNCHRONOUS)
    assert exact(read_metrics(run_folder)) == exact(unbroken)
    assert contents(run_folder) == contents(tmp_path / "unbroken")
    assert not list((run_folder / "checkpoints").glob(".tmp-*"))


def test_a_bad_step_finds_the_checkpoint_that_was_being_written(train: Train, tmp_path: Path) -> None:
    """The writing is held until the bad step is known."""
    faults = ["--poison=1:6:nan", "--hold=logs/bad-step-00000006.json"]
    with pytest.raises(AssertionError, match="step 6 is bad"):
        train("stop", *ASYNCHRONOUS, *faults, num_processes=2, program=HELD)
    assert os.readlink(tmp_path / "stop/checkpoints/latest") == "step_00000004"
    skipping = train("skipping", *ASYNCHRONOUS, "--training.skip_steps=[5-6]", num_processes=2)
    rolled_back = train("back", *ASYNCHRONOUS, *faults, "--faults.on_nonfinite=rollback", num_processes=2, program=HELD)
    good = [row for row in exact(skipping) if row[0] not in (5, 6)]
    assert [row for row in exact(rolled_back) if row[0] not in (5, 6)] == good


def test_a_failed_run_does_not_wait_for_its_writer(train: Train, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ValueError.*no-number"):
        train("run", *ASYNCHRONOUS, "--poison=0:6:no-number", "--hold=never", program=HELD)
    assert not psutil.pid_exists(int((tmp_path / "run/writer-0-4").read_text()))
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))
