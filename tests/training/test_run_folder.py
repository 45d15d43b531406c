"""What a run leaves behind: metrics, TensorBoard events, the resolved recipe, the losses on validation data."""

import json
import time
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import Train

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.monitoring.run_status import read_run
from megatron_tpt.recipes.pretrain import PretrainRecipe


@pytest.fixture
def changes(recipe: dict, index_prefix: Path) -> dict:
    return {
        "training": {**recipe["training"], "validation_interval": 10, "validation_steps": 2},
        "data": {"train": str(index_prefix), "validation": str(index_prefix)},
        "logging": {"log_interval": 5, "peak_tflops": 1.0},
    }


def test_metrics_tensorboard_and_recipe_say_the_same(train: Train, changes: dict, tmp_path: Path) -> None:
    rows = train("run", changes=changes)
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [5, 10, 15, 20]
    assert [row["tokens"] for row in training] == [step * 8 * 32 for step in (5, 10, 15, 20)]
    names = {"step", "loss", "loss_document", "loss_thinking", "tokens", "learning_rate", "grad_norm", "tokens_per_s"}
    assert names | {"tflops_per_device", "mfu", "data_wait_s"} <= training[0].keys()
    validation = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert validation.keys() == {10, 20} and validation[20] < validation[10]

    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for name in ("loss", "loss_thinking", "learning_rate", "tokens_per_s"):
        scalars = {event.step: event.value for event in events.Scalars(name)}
        assert scalars == pytest.approx({row["step"]: row[name] for row in training}, rel=1e-6)
    resolved = recipe_from_dict(PretrainRecipe, yaml.safe_load((tmp_path / "run/run.yaml").read_text()))
    assert resolved.training.validation_interval == 10 and resolved.model.vocab_size == 320


def test_validation_leaves_training_as_it_is(train: Train, changes: dict) -> None:
    with_validation = [row for row in train("with", changes=changes) if "loss" in row]
    without = train("without", "--training.validation_interval=0", "--data.validation=[]", changes=changes)
    assert [row["loss"] for row in with_validation] == [row["loss"] for row in without]


def test_a_half_written_line_of_metrics_is_removed_on_resume(train: Train, tmp_path: Path) -> None:
    train("run", "--checkpoint.save_interval=10")
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text(metrics.read_text() + json.dumps({"step": 21})[:7])
    assert [row["step"] for row in train("run", "--checkpoint.save_interval=10")] == list(range(1, 21))


def test_the_folder_says_how_far_the_run_is(train: Train, changes: dict, tmp_path: Path) -> None:
    rows = train("run", "--training.num_steps=10", changes=changes)
    found = read_run(tmp_path / "run", time.time())
    warnings = [line for line in found.warnings if "waits for data" not in line]  # which a busy machine does
    assert (found.state, found.step, found.num_steps, warnings) == ("finished", 10, 10, [])
    last = {name: value for row in rows for name, value in row.items()}
    names = ("loss", "loss_document", "loss_thinking", "validation_loss")
    assert {name: found.losses[name] for name in names} == {name: last[name] for name in names}
    assert (found.tokens, found.tokens_per_s, found.mfu) == (last["tokens"], last["tokens_per_s"], last["mfu"])
    assert found.checkpoint_step == 10
    assert found.heartbeat_age_s is not None and 0 <= found.heartbeat_age_s < 60
