"""Megatron FSDP trains what the other layouts train, and is checkpointed with them."""

import shutil
from pathlib import Path

import pytest
from training_runs import Train

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.errors import UserError
from megatron_tpt.recipes.pretrain import PretrainRecipe

OVERLAP = ["--parallel.overlap_grad_reduce=true", "--parallel.overlap_param_gather=true"]
STRATEGIES = {
    "optim": ["--parallel.fsdp=optim", *OVERLAP],
    "optim_grads": ["--parallel.fsdp=optim_grads"],
    "optim_grads_params": ["--parallel.fsdp=optim_grads_params"],
    "overlapped": ["--parallel.fsdp=optim_grads_params", *OVERLAP],
}


@pytest.fixture(scope="module")
def short(recipe: dict, index_prefix: Path) -> dict:
    training = {"num_steps": 6, "validation_interval": 3, "validation_steps": 1}
    return {
        "training": {**recipe["training"], **training},
        "data": {"train": str(index_prefix), "validation": str(index_prefix)},
    }


def values(metrics: list[dict], name: str) -> list[float]:
    """Of the lines that have it: validation has lines of its own."""
    return [line[name] for line in metrics if name in line]


@pytest.fixture(scope="module")
def single() -> dict:
    return {}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_equal_those_without_it(strategy: str, train: Train, single: dict, short: dict) -> None:
    if not single:
        single["metrics"] = train("single", changes=short)
    metrics = train(strategy, *STRATEGIES[strategy], changes=short, num_processes=2)
    for name in ("loss", "grad_norm", "param_norm", "validation_loss"):
        assert values(metrics, name) == pytest.approx(values(single["metrics"], name), rel=1e-5), name
    assert len(values(metrics, "validation_loss")) == 2


FSDP, BF16 = STRATEGIES["optim_grads_params"], "--training.dtype=bfloat16"


def test_a_resumed_run_has_the_losses_of_the_unbroken_one_to_the_bit_and_goes_on_without_it(
    train: Train, recipe: dict, short: dict, tmp_path: Path
) -> None:
    model = {**recipe["model"], "tie_embeddings": True}
    changes = {**short, "model": model, "checkpoint": {"save_interval": 3}}
    settings = [*FSDP, BF16]
    unbroken = train("run", *settings, changes=changes, num_processes=2)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    resumed = train("run", *settings, changes=changes, num_processes=2)
    for name in ("step", "loss", "grad_norm", "learning_rate", "validation_loss"):
        assert values(resumed, name) == values(unbroken, name), name

    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    without = train("run", BF16, changes=changes)
    assert values(without, "loss") == pytest.approx(values(unbroken, "loss"), rel=1e-3)

    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    with_others = train("run", *STRATEGIES["optim"], BF16, changes=changes)
    assert values(with_others, "loss") == pytest.approx(values(unbroken, "loss"), rel=1e-3)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"parallel": {"tensor_parallel_size": 2}}, "tensor_parallel_size and pipeline_parallel_size of 1"),
        ({"parallel": {"distributed_optimizer": False}}, "needs parallel.distributed_optimizer"),
        ({"parallel": {"fsdp": "optim"}}, "needs parallel.overlap_grad_reduce"),
        ({"optimizer": {"name": "muon"}}, "give --parallel.fsdp=none"),
    ],
)
def test_what_it_cannot_do_is_refused(raw: dict, words: str) -> None:
    parallel = {"fsdp": "optim_grads", **raw.get("parallel", {})}
    with pytest.raises(UserError) as error:
        model = {"vocab_size": 100}
        recipe_from_dict(PretrainRecipe, {"model": model, "data": {"train": "p"}, **raw, "parallel": parallel}).check(2)
    assert words in str(error.value) and "\n" not in str(error.value)
