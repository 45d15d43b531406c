"""Muon: the update is the one of its formula, alike under every layout, and a run resumes to the bit."""

import shutil
from pathlib import Path

import pytest
import torch
from training_runs import Train

from megatron_tpt import platform
from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.config.optimizer import OptimizerConfig
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.errors import UserError
from megatron_tpt.models.spec import build_chunks
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.optimizer import build_optimizer, build_schedule, current_learning_rate, wrap_model

MUON = {"name": "muon", "learning_rate": 1e-2, "adam_learning_rate": 3e-3, "warmup_steps": 2}
# Newton-Schulz iterations amplify what differs between layouts in the last digit: here they are done in fp32.
FP32 = ["--parallel.distributed_optimizer=false", "--optimizer.muon_matmul_precision=highest"]
BF16 = ["--training.dtype=bfloat16"]
OVERLAP = ["--parallel.overlap_grad_reduce=true", "--parallel.overlap_param_gather=true"]
LAYOUTS = {
    "tp2": [FP32, "--parallel.tensor_parallel_size=2"],
    "tp2-together": [FP32, "--parallel.tensor_parallel_size=2", "--optimizer.muon_tensor_parallel=distributed"],
    "pp2": [FP32, "--parallel.pipeline_parallel_size=2"],
    "dp2": [FP32],
}


@pytest.fixture(scope="module")
def muon(recipe: dict) -> dict:
    training = {**recipe["training"], "num_steps": 8}
    return {"optimizer": MUON, "training": training, "checkpoint": {"save_interval": 4}}


@pytest.fixture(scope="module")
def single() -> dict:
    return {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_equal_those_of_one_process(layout: str, train: Train, single: dict, muon: dict) -> None:
    if not single:
        single["metrics"] = train("single", *FP32, changes=muon)
    precise, *overrides = LAYOUTS[layout]
    metrics = train(layout, *precise, *overrides, changes=muon, num_processes=2)
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in metrics] == pytest.approx([m[name] for m in single["metrics"]], rel=1e-4), name


def test_whole_matrices_on_different_ranks_change_nothing(train: Train, muon: dict) -> None:
    precise = [*BF16, "--optimizer.muon_matmul_precision=highest"]
    plain = train("plain", *precise, "--parallel.distributed_optimizer=false", changes=muon, num_processes=2)
    split = train("split", *precise, *OVERLAP, changes=muon, num_processes=2)
    assert [m["loss"] for m in split] == pytest.approx([m["loss"] for m in plain], rel=1e-4)


@pytest.mark.parametrize(
    "overrides", [pytest.param(FP32, id="whole"), pytest.param(BF16, id="split", marks=pytest.mark.slow)]
)
def test_a_resumed_run_has_the_losses_of_the_unbroken_one_to_the_bit(
    overrides: list[str], train: Train, muon: dict, tmp_path: Path
) -> None:
    unbroken = train("run", *overrides, changes=muon, num_processes=2)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000008")
    resumed = train("run", *overrides, changes=muon, num_processes=2)
    for name in ("step", "loss", "grad_norm", "learning_rate"):
        assert [m[name] for m in resumed] == [m[name] for m in unbroken]

    shutil.rmtree(tmp_path / "run/checkpoints/step_00000008")
    moved = train("run", *overrides, changes=muon)
    assert [m["loss"] for m in moved] == pytest.approx([m["loss"] for m in unbroken], rel=1e-3)

    shutil.rmtree(tmp_path / "run/checkpoints/step_00000008")
    with pytest.raises(AssertionError, match=r"was written with .*optimizer\.name=muon"):
        train("run", "--optimizer.name=adam", "--optimizer.adam_learning_rate=null", changes=muon)
    was_split = overrides is BF16
    with pytest.raises(AssertionError, match=f"was written with parallel.distributed_optimizer={was_split}".lower()):
        train("run", *BF16, f"--parallel.distributed_optimizer={not was_split}".lower(), changes=muon)


SHAPE = {"vocab_size": 100, "num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "num_query_groups": 2}


def a_recipe(folder: Path, **optimizer: object) -> PretrainRecipe:
    raw = {
        "run": {"output_dir": str(folder)},
        "model": {**SHAPE, "qkv_bias": True},
        "training": {"dtype": "float32", "num_steps": 10},
        "parallel": {"distributed_optimizer": False},
        "data": {"train": "prefix"},
        "optimizer": {"name": "muon", "muon_matmul_precision": "highest", "clip_grad": 0.0, **optimizer},
    }
    return recipe_from_dict(PretrainRecipe, raw)


def orthogonalised(matrix: torch.Tensor, num_steps: int) -> torch.Tensor:
    """K. Jordan et al., "Muon" (kellerjordan.github.io/posts/muon), newtonschulz5."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm()
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon_update(matrix: torch.Tensor, parts: list[list[int]], recipe: OptimizerConfig) -> torch.Tensor:
    """The update of a matrix whose rows `parts` are orthogonalised separately."""
    update = torch.empty_like(matrix)
    for rows in parts:
        scale = recipe.muon_scale_factor * max(len(rows), matrix.shape[1]) ** 0.5
        update[rows] = scale * orthogonalised(matrix[rows], recipe.muon_newton_schulz_steps)
    return update


def rows_of_qkv(recipe: PretrainRecipe) -> list[list[int]]:
    """Rows of queries, of keys and of values: each group of heads has its queries, then a key and a value."""
    model = recipe.model
    queries = model.num_attention_heads // model.query_groups * model.kv_channels
    width, parts = queries + 2 * model.kv_channels, [[], [], []]
    for row in range(model.query_groups * width):
        place = row % width
        parts[0 if place < queries else 1 if place < queries + model.kv_channels else 2].append(row)
    return parts


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
def test_updates_are_those_of_the_formulas(nesterov: bool, tmp_path: Path) -> None:
    rates = {"learning_rate": 0.02, "adam_learning_rate": 0.01, "schedule": "constant"}
    recipe = a_recipe(tmp_path, **rates, muon_coefficients="simple", muon_nesterov=nesterov)
    settings = recipe.optimizer
    mean_of, draw = {}, torch.Generator().manual_seed(0)
    with platform.process_groups(ParallelConfig()):
        platform.seed_everything(1)
        gpts = build_chunks(recipe.model, recipe.parallel, recipe.training, seed=1)
        optimizer = build_optimizer(wrap_model(gpts, recipe), recipe)
        build_schedule(optimizer, recipe)
        parameters = dict(gpts[0].named_parameters())
        of_adam = [name for name, p in parameters.items() if p.dim() == 1 or "embedding" in name or "output" in name]
        twins = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
        adams = [{"params": [twins[name]], "weight_decay": 0.1 * (twins[name].dim() > 1)} for name in of_adam]
        adam = torch.optim.AdamW(adams, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
        for _ in range(3):
            for name, parameter in parameters.items():
                gradient = torch.randn(parameter.shape, generator=draw)
                parameter.main_grad.copy_(gradient)
                twins[name].grad = gradient
            optimizer.step()
            adam.step()
            for name in parameters.keys() - set(of_adam):
                twin, gradient = twins[name].data, twins[name].grad
                mean_of[name] = mean = 0.95 * mean_of.get(name, 0.0) + 0.05 * gradient
                ahead = 0.95 * mean + 0.05 * gradient if nesterov else mean
                parts = rows_of_qkv(recipe) if "linear_qkv" in name else [list(range(len(twin)))]
                twin.copy_(twin * (1 - 0.02 * 0.1) - 0.02 * muon_update(ahead, parts, settings))
        assert {name.split(".")[-2] for name in mean_of} == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
        for name, parameter in parameters.items():
            assert torch.allclose(parameter, twins[name], rtol=1e-4, atol=1e-5), name


def test_both_learning_rates_follow_the_schedule(tmp_path: Path) -> None:
    rates = {"learning_rate": 0.02, "min_learning_rate": 0.002, "adam_learning_rate": 0.005, "warmup_steps": 3}
    recipe = a_recipe(tmp_path, **rates)
    with platform.process_groups(ParallelConfig()):
        platform.seed_everything(1)
        gpts = build_chunks(recipe.model, recipe.parallel, recipe.training, seed=1)
        optimizer = build_optimizer(wrap_model(gpts, recipe), recipe)
        schedule = build_schedule(optimizer, recipe)
        found = []
        for _ in range(10):
            by_matrix = {group.get("optimizer") != "adam": group["lr"] for group in optimizer.param_groups}
            assert current_learning_rate(optimizer) == by_matrix[True]
            found.append(by_matrix)
            schedule.step(1)
    assert [rate[True] for rate in found[:4]] == pytest.approx([0, 0.02 / 3, 0.04 / 3, 0.02])
    assert found[9][True] < found[5][True] < 0.02
    assert [rate[False] for rate in found] == pytest.approx([rate[True] / 4 for rate in found])


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"training": {"dtype": "float32"}}, "give --parallel.distributed_optimizer=false"),
        ({"optimizer": {"name": "adam", "adam_learning_rate": 1e-3}}, "is for optimizer.name=muon"),
        ({"optimizer": {"name": "muon", "muon_momentum": 1.0}}, "optimizer.muon_momentum=1.0 must lie"),
        ({"optimizer": {"name": "muon", "muon_newton_schulz_steps": 0}}, "must be 1 or more"),
    ],
)
def test_what_muon_cannot_do_is_refused(raw: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        base = {"model": SHAPE, "data": {"train": "prefix"}, "optimizer": {"name": "muon"}}
        recipe_from_dict(PretrainRecipe, {**base, **raw}).check(1)
    assert words in str(error.value) and "\n" not in str(error.value)
