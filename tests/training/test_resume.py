"""A run that is killed, at any moment and however often, ends as if it had not been."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from training_runs import Train, finish, read_metrics, start_training

from megatron_tpt import platform
from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.models.spec import build_chunks
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training import checkpoint_loading, checkpoint_saving
from megatron_tpt.training.optimizer import build_optimizer, wrap_model

EXACT = ("step", "loss", "loss_document", "loss_thinking", "grad_norm", "learning_rate", "tokens")


def exact(metrics: list[dict]) -> list[list]:
    return [[m[name] for name in EXACT] for m in metrics]


def kill_at_step(process: subprocess.Popen, run_folder: Path, step: int, *, rank: int | None = None) -> None:
    """Kill -9 every process of a run when it has reported `step`; or only a rank of it, which must end all."""
    metrics = run_folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed: " + process.communicate()[0]
    if rank is not None:
        beat = json.loads((run_folder / f"logs/heartbeats/rank-{rank:05d}.json").read_text())
        os.kill(beat["pid"], signal.SIGKILL)
    else:
        launcher = psutil.Process(process.pid)
        for one in [launcher, *launcher.children(recursive=True)]:  # torchrun starts its ranks in sessions of their own
            one.kill()
    process.communicate()  # until no process is left that could write
    assert process.returncode != 0


@pytest.fixture(scope="module")
def dropout(recipe: dict) -> dict:
    """Dropout makes the random state matter."""
    return {
        "model": {**recipe["model"], "hidden_dropout": 0.1, "attention_dropout": 0.1},
        "training": {**recipe["training"], "num_steps": 36},
        "checkpoint": {"save_interval": 6},
    }


@pytest.mark.parametrize(
    ("overrides", "rank"),
    [
        pytest.param(["--parallel.tensor_parallel_size=2"], None, id="tensor-parallel, all", marks=pytest.mark.slow),
        pytest.param([], 1, id="data-parallel, one rank"),
    ],
)
def test_killed_run_goes_on_to_the_same_losses_to_the_bit(
    overrides: list[str], rank: int | None, train: Train, recipe: dict, dropout: dict, tmp_path: Path
) -> None:
    unbroken = train("unbroken", *overrides, num_processes=2, changes=dropout)
    run_folder, path = tmp_path / "killed", tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump({**recipe, **dropout, "run": {"output_dir": str(run_folder)}}))
    process = start_training(path, *overrides, num_processes=2)
    kill_at_step(process, run_folder, random.randint(7, 24), rank=rank)
    resumed = finish(start_training(path, *overrides, num_processes=2))

    assert "resumed from" in resumed
    assert exact(read_metrics(run_folder)) == exact(unbroken)


def test_checkpoint_of_one_layout_resumes_under_another(train: Train, tmp_path: Path) -> None:
    save = {"checkpoint": {"save_interval": 10}}
    unbroken = train("unbroken", changes=save)
    train("moved", "--parallel.tensor_parallel_size=2", num_processes=2, changes=save)
    shutil.rmtree(tmp_path / "moved/checkpoints/step_00000020")
    moved = train("moved", "--parallel.pipeline_parallel_size=2", num_processes=2, changes=save)
    assert [m["step"] for m in moved] == list(range(1, 21))
    assert [m["loss"] for m in moved] == pytest.approx([m["loss"] for m in unbroken], rel=1e-5)
    assert [m["grad_norm"] for m in moved] == pytest.approx([m["grad_norm"] for m in unbroken], rel=1e-4)


def test_optimizer_state_written_by_all_ranks_goes_on_at_another_data_parallel_size(
    train: Train, dropout: dict, tmp_path: Path
) -> None:
    changes = dropout | {"checkpoint": {"save_interval": 10, "optimizer_sharding": "dp_reshardable"}}
    changes["training"] = {**dropout["training"], "num_steps": 20}
    unbroken = train("unbroken", num_processes=2, changes=changes)
    sizes = [path.stat().st_size for path in (tmp_path / "unbroken/checkpoints/latest").glob("__1_*")]
    assert sum(sizes) > 0.3 * sum(
        path.stat().st_size for path in (tmp_path / "unbroken/checkpoints/latest").glob("__0_*")
    )
    shutil.rmtree(tmp_path / "unbroken/checkpoints/step_00000020")
    with pytest.raises(AssertionError, match=r"=dp_reshardable, parallel\.tensor_parallel_size=1: resume with that"):
        train("unbroken", "--parallel.tensor_parallel_size=2", num_processes=2, changes=changes)
    assert exact(train("unbroken", num_processes=2, changes=changes)) == exact(unbroken)
    still = {"hidden_dropout": 0.0, "attention_dropout": 0.0}  # another rank draws it
    changes["model"] = {**dropout["model"], **still}
    reference = train("reference", num_processes=2, changes=changes)
    shutil.rmtree(tmp_path / "reference/checkpoints/step_00000020")
    alone = train("reference", changes=changes)
    assert [m["loss"] for m in alone] == pytest.approx([m["loss"] for m in reference], rel=1e-5)


def test_a_checkpoint_of_another_kind_of_device_loads_without_its_random_state(
    recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_from_dict(PretrainRecipe, {**recipe, "run": {"output_dir": str(tmp_path)}})
    recipe.model.vocab_size = 320
    with platform.process_groups(ParallelConfig()):
        platform.seed_everything(1)
        gpts = build_chunks(recipe.model, recipe.parallel, recipe.training, seed=1)
        optimizer = build_optimizer(wrap_model(gpts, recipe), recipe)
        optimizer.step()
        own_layout = checkpoint_saving.layout
        for device in ("cpu", "cuda"):
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint_saving, "layout", lambda device=device: [device, *own_layout()[1:]])
                checkpoint_saving.save_checkpoint(
                    tmp_path / device, gpts, optimizer, {}, recipe_yaml="", tokenizer_path=None
                )
            saved, drawn = torch.get_rng_state(), torch.rand(3)
            checkpoint_loading.load_checkpoint(tmp_path / device, gpts, optimizer)
            assert torch.equal(torch.get_rng_state(), saved) == (device == "cpu")
            assert device != "cpu" or torch.equal(torch.rand(3), drawn)


def test_half_written_checkpoint_is_not_taken(train: Train, tmp_path: Path) -> None:
    save = {"checkpoint": {"save_interval": 10}}
    unbroken = train("run", changes=save)
    checkpoints = tmp_path / "run/checkpoints"
    # What a kill in the middle of a save leaves: the temporary folder, and `latest` still at the one before.
    (checkpoints / "step_00000020").rename(checkpoints / ".tmp-step_00000020")
    next((checkpoints / ".tmp-step_00000020").glob("*.distcp")).write_bytes(b"half")
    again = train("run", changes=save)
    assert exact(again) == exact(unbroken)
    assert os.readlink(checkpoints / "latest") == "step_00000020"
    assert not list(checkpoints.glob(".tmp-*"))


def test_finished_run_does_nothing_again(train: Train) -> None:
    first = train("run")
    assert train("run") == first


def test_only_the_newest_checkpoints_are_kept(train: Train, tmp_path: Path) -> None:
    train("run", "--checkpoint.save_interval=5", "--checkpoint.keep_last=2")
    folders = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert folders == ["latest", "step_00000015", "step_00000020"]


def test_overlapped_gathering_leaves_nothing_old_in_metrics_and_checkpoints(
    train: Train, index_prefix: Path, tmp_path: Path
) -> None:
    changes = {
        "data": {"train": str(index_prefix), "validation": str(index_prefix)},
        "checkpoint": {"save_interval": 10},
    }
    options = ["--training.dtype=bfloat16", "--training.validation_interval=5", "--training.validation_steps=2"]
    overlap = ["--parallel.overlap_grad_reduce=true", "--parallel.overlap_param_gather=true"]

    def figures(name: str, *overrides: str) -> list[list]:
        metrics = train(name, *options, *overrides, num_processes=2, changes=changes)
        return [[m.get(name) for name in (*EXACT, "param_norm", "validation_loss")] for m in metrics]

    plain = figures("plain")
    assert figures("overlapped", *overlap) == plain
    shutil.rmtree(tmp_path / "overlapped/checkpoints/step_00000020")
    assert figures("overlapped", *overlap) == plain


def test_weights_are_gathered_once_for_all_who_read_them(train: Train, index_prefix: Path, tmp_path: Path) -> None:
    overlap = ["--parallel.overlap_grad_reduce=true", "--parallel.overlap_param_gather=true", "--training.num_steps=4"]
    data = {"data": {"train": str(index_prefix), "validation": str(index_prefix)}, "faults": {"desync_interval": 1}}

    def num_gathers(name: str, interval: int) -> int:
        intervals = ["logging.log_interval", "training.validation_interval", "checkpoint.save_interval"]
        options = [*overlap, "--training.validation_steps=1", *(f"--{one}={interval}" for one in intervals)]
        train(name, *options, num_processes=2, changes=data, program="counting_pretrain")
        return json.loads((tmp_path / name / "gathers.json").read_text())

    after_each_step = num_gathers("read", interval=1)
    assert after_each_step == num_gathers("not-read", interval=100) > 0  # once before each step, and at the end


def test_copies_are_written_by_the_ranks_that_hold_them_in_shares(train: Train, tmp_path: Path) -> None:
    train("run", num_processes=2)
    first, second = (
        sum(path.stat().st_size for path in (tmp_path / "run/checkpoints/latest").glob(f"__{rank}_*"))
        for rank in range(2)
    )
    assert 0.5 < first / second < 2
