"""Checkpoints that were damaged on the disk, or do not fit on it: what is lost is the steps since the one before."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from small_disk import small_disk
from training_runs import PRETRAIN, Train, Workers, read_metrics

from megatron_tpt.training.checkpoint_files import delete_old_checkpoints, finished_checkpoints

EXACT = ("step", "loss", "grad_norm")


def exact(metrics: list[dict]) -> list[list]:
    return [[m[name] for name in EXACT] for m in metrics]


@pytest.fixture
def changes(recipe: dict) -> dict:
    return {"checkpoint": {"save_interval": 2}, "training": {**recipe["training"], "num_steps": 4}}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(
    train: Train, changes: dict, tmp_path: Path, workers: Workers
) -> None:
    unbroken = train("run", changes=changes, num_processes=2)
    checkpoints = tmp_path / "run/checkpoints"
    for damage, name in ((flip, "__1_0.distcp"), (truncate, "__0_0.distcp"), (Path.unlink, "tokenizer/tokenizer.json")):
        damage(checkpoints / "step_00000004" / name)
        output = workers.run(PRETRAIN, [str(tmp_path / "run.yaml")], 2)
        assert f"IS DAMAGED: {name}" in output and "resumed from" in output and "at step 2" in output
        assert exact(read_metrics(tmp_path / "run")) == exact(unbroken)
        names = {path.name for path in checkpoints.iterdir()}
        assert names == {"step_00000002", "step_00000004", "damaged-step_00000004", "latest"}
        assert os.readlink(checkpoints / "latest") == "step_00000004"

    flip(checkpoints / "step_00000004/__0_0.distcp")
    with pytest.raises(AssertionError, match=r"UserError.*is damaged"):
        train("next", f"--training.init_from={checkpoints}/latest", changes=changes)
    truncate(checkpoints / "step_00000002/__0_0.distcp")
    with pytest.raises(AssertionError, match=r"UserError.*is whole"):  # and it does not begin from step 0 unasked
        train("run", changes=changes)
    assert (checkpoints / "step_00000002").is_dir()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in-the-step", "during-training"])
def test_a_full_disk_leaves_the_old_checkpoint_and_training_goes_on(
    asynchronous: bool, train: Train, changes: dict, tmp_path: Path, workers: Workers
) -> None:
    changes["checkpoint"]["asynchronous"] = asynchronous
    unbroken = train("unbroken", changes=changes, num_processes=2)
    one = sum(path.stat().st_size for path in (tmp_path / "unbroken/checkpoints/step_00000004").rglob("*"))
    checkpoints = tmp_path / "run/checkpoints"
    with small_disk(checkpoints, one + one // 2):
        with pytest.raises(AssertionError, match=r"step_00000004 could not be written"):  # the last has to be
            train("run", "--checkpoint.save_interval=1", changes=changes, num_processes=2)
        assert exact(read_metrics(tmp_path / "run")) == exact(unbroken)  # the steps 2 and 3 were not saved either
        assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000001"]
        subprocess.run(["mount", "-o", f"remount,size={4 * one}", str(checkpoints)], check=True)
        output = workers.run(PRETRAIN, [str(tmp_path / "run.yaml")], 2)
        assert "at step 1" in output and exact(read_metrics(tmp_path / "run")) == exact(unbroken)


def test_every_nth_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step in range(100, 1000, 100):
        (tmp_path / f"step_{step:08d}").mkdir()
    delete_old_checkpoints(tmp_path, keep_last=2, keep_every=300)
    kept = sorted(int(path.name.removeprefix("step_")) for path in tmp_path.iterdir())
    assert kept == [300, 600, 800, 900]


def test_an_old_checkpoint_that_cannot_be_deleted_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    for step in (1, 2, 3):
        (tmp_path / f"step_{step:08d}").mkdir()
    monkeypatch.setattr(shutil, "rmtree", busy)
    delete_old_checkpoints(tmp_path, keep_last=1, keep_every=None)
    assert capsys.readouterr().out.count("could not be deleted: [Errno 39] Directory not empty") == 2
    assert finished_checkpoints(tmp_path) == [tmp_path / "step_00000003"]
