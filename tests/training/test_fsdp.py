"""Megatron FSDP trains what the other layouts train, and is checkpointed with them."""

import shutil
from pathlib import Path

import pytest
from training_runs import Train

from megatron_tpt.config.load import check, recipe_from_dict
from megatron_tpt.config.recipe import PretrainRecipe
from megatron_tpt.errors import UserError

OVERLAP = ["--parallel.overlap_grad_reduce=true", "--parallel.overlap_param_gather=true"]
STRATEGIES = {
    "optim": ["--parallel.fsdp=optim", *OVERLAP],
    "optim_grads": ["--parallel.fsdp=optim_grads"],
    "optim_grads_params": ["--parallel.fsdp=optim_grads_params"],
    "overlapped": ["--parallel.fsdp=optim_grads_params", *OVERLAP],
}


@pytest.fixture(scope="module")
def short(recipe: dict) -> dict:
    return {"training": {**recipe["training"], "num_steps": 6}}


@pytest.fixture(scope="module")
def single() -> dict:
    return {}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_equal_those_without_it(strategy: str, train: Train, single: dict, short: dict) -> None:
    if not single:
        single["metrics"] = train("single", changes=short)
    metrics = train(strategy, *STRATEGIES[strategy], changes=short, num_processes=2)
    for name in ("loss", "grad_norm", "param_norm"):
        assert [m[name] for m in metrics] == pytest.approx([m[name] for m in single["metrics"]], rel=1e-5), name


FSDP = STRATEGIES["optim_grads_params"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_has_the_losses_of_the_unbroken_one_to_the_bit_with_and_without_it(
    dtype: str, train: Train, short: dict, tmp_path: Path
) -> None:
    changes = {**short, "checkpoint": {"save_interval": 3}}
    settings = [*FSDP, f"--training.dtype={dtype}"]
    unbroken = train("run", *settings, changes=changes, num_processes=2)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    resumed = train("run", *settings, changes=changes, num_processes=2)
    for name in ("step", "loss", "grad_norm", "learning_rate"):
        assert [m[name] for m in resumed] == [m[name] for m in unbroken], name

    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    without = train("run", f"--training.dtype={dtype}", changes=changes)
    assert [m["loss"] for m in without] == pytest.approx([m["loss"] for m in unbroken], rel=1e-3)

    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    with_others = train("run", *STRATEGIES["optim"], f"--training.dtype={dtype}", changes=changes)
    assert [m["loss"] for m in with_others] == pytest.approx([m["loss"] for m in unbroken], rel=1e-3)


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
        check(
            recipe_from_dict(PretrainRecipe, {"model": model, "data": {"train": "p"}, **raw, "parallel": parallel}), 2
        )
    assert words in str(error.value) and "\n" not in str(error.value)
