"""Learning-rate schedules, batch sizes that grow, weight decay by group, skipped steps."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_runs import Train

from megatron_tpt import platform
from megatron_tpt.config.optimizer import OptimizerConfig
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.run import RunConfig
from megatron_tpt.config.training import BatchSizeStage, TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.models.spec import build_chunks
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.optimizer import build_optimizer, build_schedule, wrap_model


def rates(**settings: object) -> list[float]:
    """The learning rate of each of 100 updates; 10 of warm-up, from 1.0 to 0.1."""
    recipe = PretrainRecipe(
        optimizer=OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10, **settings),
        training=TrainingConfig(num_steps=100),
    )
    groups = [{"max_lr": 1.0, "min_lr": 0.1}]
    schedule = build_schedule(SimpleNamespace(param_groups=groups), recipe)
    result = []
    for _ in range(101):
        result.append(groups[0]["lr"])
        schedule.step(1)
    return result


def decayed(share: float) -> float:
    return 0.1 + 0.9 * share


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, {10: 1.0, 55: 1.0, 100: 1.0}),
        ({"schedule": "linear"}, {10: 1.0, 55: decayed(0.5), 100: 0.1}),
        ({"schedule": "cosine"}, {10: 1.0, 55: decayed(0.5), 70: decayed((1 + math.cos(math.pi * 2 / 3)) / 2)}),
        ({"schedule": "cosine", "decay_steps": 50}, {30: decayed(0.5), 50: 0.1, 51: 0.1, 100: 0.1}),
        ({"schedule": "wsd"}, {10: 1.0, 90: 1.0, 95: decayed(0.5), 100: 0.1}),
        ({"schedule": "wsd", "wsd_decay_steps": 40, "wsd_decay_shape": "minus_sqrt"}, {60: 1.0, 70: decayed(0.5)}),
        ({"schedule": "inverse-square-root"}, {10: 1.0, 40: 0.5, 90: 1 / 3}),
    ],
    ids=lambda value: "-".join(str(v) for v in value.values()) if "schedule" in value else "",
)
def test_the_rate_warms_up_and_follows_its_schedule(settings: dict, expected: dict[int, float]) -> None:
    rate = rates(**settings)
    assert rate[:10] == pytest.approx([step / 10 for step in range(10)])
    for step, value in expected.items():
        assert rate[step] == pytest.approx(value), f"step {step}"


def test_batches_grow_and_count_their_samples() -> None:
    training = TrainingConfig(global_batch_size=8, batch_size_ramp=[BatchSizeStage(2, 2), BatchSizeStage(3, 4)])
    assert [training.batch_size(step) for step in range(7)] == [2, 2, 4, 4, 4, 8, 8]
    assert [training.num_samples(steps) for steps in range(8)] == [0, 2, 4, 8, 12, 16, 24, 32]


def test_steps_to_skip_are_numbers_and_ranges() -> None:
    training = TrainingConfig(skip_steps=[3, "5-7"])
    assert [step for step in range(1, 10) if training.skips(step)] == [3, 5, 6, 7]
    for wrong in ("x", "7-5", "0", "-3", "1-2-3"):
        with pytest.raises(UserError, match="skip_steps"):
            TrainingConfig(skip_steps=[wrong])


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_weight_decay_spares_biases_norms_and_on_demand_embeddings(decay_embeddings: bool, tmp_path: Path) -> None:
    recipe = PretrainRecipe(
        run=RunConfig(output_dir=tmp_path),
        model=GPTConfig(vocab_size=100, qkv_bias=True),
        training=TrainingConfig(dtype="float32"),
        optimizer=OptimizerConfig(weight_decay=0.3, decay_embeddings=decay_embeddings),
    )
    with platform.process_groups(ParallelConfig()):
        platform.seed_everything(1)
        gpts = build_chunks(recipe.model, recipe.parallel, recipe.training, seed=1)
        optimizer = build_optimizer(wrap_model(gpts, recipe), recipe)
        build_schedule(optimizer, recipe)
        decay: dict[float, int] = {}
        for group in optimizer.param_groups:
            size = sum(parameter.numel() for parameter in group["params"])
            decay[group["weight_decay"]] = decay.get(group["weight_decay"], 0) + size
        names = dict(gpts[0].named_parameters())
        spared = sum(p.numel() for p in names.values() if p.dim() == 1)
        tables = sum(p.numel() for name, p in names.items() if "embedding" in name or "output_layer" in name)
    assert spared and tables
    assert decay[0.0] == spared + (0 if decay_embeddings else tables)
    assert sum(decay.values()) == recipe.model.num_parameters()


def test_a_run_with_growing_batches_resumes_at_the_same_sample(train: Train, recipe: dict, tmp_path: Path) -> None:
    ramp = [{"num_steps": 3, "global_batch_size": 4}, {"num_steps": 4, "global_batch_size": 12}]
    changes = {
        "training": {**recipe["training"], "num_steps": 10, "batch_size_ramp": ramp},
        "checkpoint": {"save_interval": 5},
    }
    unbroken = train("unbroken", changes=changes)
    train("broken", changes=changes)
    shutil.rmtree(tmp_path / "broken/checkpoints/step_00000010")
    resumed = train("broken", changes=changes, num_processes=2)

    samples = [4, 8, 12, 24, 36, 48, 60, 68, 76, 84]
    assert [m["tokens"] for m in resumed] == [32 * n for n in samples]
    assert [m["loss"] for m in resumed] == pytest.approx([m["loss"] for m in unbroken], rel=1e-5)


def test_a_skipped_step_changes_no_weight_and_takes_its_data(train: Train, recipe: dict, index_prefix: Path) -> None:
    changes = {
        "training": {**recipe["training"], "num_steps": 6, "validation_interval": 1, "validation_steps": 1},
        "data": {"train": str(index_prefix), "validation": str(index_prefix)},
    }
    lines = train("run", "--training.skip_steps=[3-4]", changes=changes)
    steps = [m for m in lines if "tokens" in m]
    validation = [m["validation_loss"] for m in lines if "validation_loss" in m]
    assert validation[1] == validation[2] == validation[3] and len({*validation}) == 4
    assert ["loss" in m for m in steps] == [True, True, False, False, True, True]
    assert [m["tokens"] for m in steps] == [8 * 32 * step for step in range(1, 7)]
