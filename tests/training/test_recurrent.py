"""Recurrent models train alike under every layout: the same depths, losses, gradients and weights."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from test_parity import GRADIENT_WORKER, OVERLAP, SP, TP2, distances, gathered
from training_runs import PRETRAIN, Train, Workers

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.models.recurrent.config import RecurrentConfig
from megatron_tpt.models.sizes import model_flops_per_token
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.batches import take_batch
from megatron_tpt.training.data import Loader

FULL = "--training.recompute=full"
HALF = "--training.micro_batch_size=1"  # two ranks of one sample each, in place of one rank of two
FEW = "--training.num_steps=4"  # of the ten that all others have
OLMO = {"norm_placement": "after", "qk_norm": True, "qk_norm_width": "all-heads"}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def recurrent(recipe: dict) -> dict:
    """1 + 2 + 1 layers, passed four times in the mean (three and one), gradients through two iterations."""
    model = {
        "family": "recurrent", "num_layers": 4, "mean_recurrences": 3, "backprop_recurrences": 2,
        **{name: recipe["model"][name] for name in ("hidden_size", "ffn_hidden_size", "num_query_groups")},
    }  # fmt: skip
    # At a rate ten times as high, rounding grows within ten steps until gradients differ in their fourth digit.
    optimizer = {**recipe["optimizer"], "learning_rate": 1e-3, "schedule": "constant"}
    return {"model": model, "training": {**recipe["training"], "num_steps": 10}, "optimizer": optimizer}


def with_curriculum(recurrent: dict) -> dict:
    """The mean rises from one."""
    return {**recurrent, "model": recurrent["model"] | {"depth_curriculum": "linear", "depth_curriculum_steps": 4}}


@pytest.fixture(scope="module")
def single() -> dict:
    """The run of one process, by family of layers: filled by the first test that needs it."""
    return {}


@pytest.mark.parametrize(
    ("layout", "num_processes", "overrides", "layers"),
    [
        ("olmo-tp2-sequence-recomputed", 2, [TP2, SP, FULL, FEW], OLMO),
        ("olmo-dp2-overlap-recomputed", 2, [HALF, OVERLAP, FULL], OLMO),
        pytest.param("recomputed", 1, [FULL], {}, marks=slow),
        pytest.param("tp2", 2, [TP2], {}, marks=slow),
        pytest.param("tp2-recomputed", 2, [TP2, FULL], {}, marks=slow),
        pytest.param("tp2-sequence", 2, [TP2, SP], {}, marks=slow),
        pytest.param("tp2-sequence-recomputed", 2, [TP2, SP, FULL], {}, marks=slow),
        pytest.param("dp2", 2, [HALF], {}, marks=slow),
        pytest.param("dp2-overlap-gather", 2, [HALF, OVERLAP, "--parallel.overlap_param_gather=true"], {}, marks=slow),
        pytest.param("olmo-tp2-sequence", 2, [TP2, SP], OLMO, marks=slow),
    ],
)
def test_losses_gradients_and_weights_equal_those_of_one_process(
    layout: str, num_processes: int, overrides: list[str], layers: dict, train: Train, tmp_path: Path,
    single: dict, recurrent: dict,
) -> None:  # fmt: skip
    changes = {**recurrent, "model": {**recurrent["model"], **layers}}
    key = json.dumps(layers)
    if key not in single:
        metrics = train("single", program=GRADIENT_WORKER, changes=changes)
        single[key] = metrics, gathered(tmp_path, "single"), gathered(tmp_path, "single", "weights")
    expected, gradients, weights = single[key]
    found = train(layout, *overrides, num_processes=num_processes, program=GRADIENT_WORKER, changes=changes)
    assert len(expected) == 10 and len(found) == (4 if FEW in overrides else 10)
    assert len({one["depth"] for one in expected}) > 4  # the depths do vary
    for ours, theirs in zip(found, expected, strict=FEW not in overrides):
        for name in ("depth", "depth_backprop", "depth_mean"):
            assert ours[name] == theirs[name], name
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), ours["step"]
        for name in ("grad_norm", "state_norm", "state_change"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)
    # Adam makes steps of full size even of gradients that are mostly rounding: weights drift apart more than gradients.
    compared = [("gradients", gradients, 1e-5), *([] if FEW in overrides else [("weights", weights, 1e-4)])]
    for what, wanted, tolerance in compared:
        distance = distances(gathered(tmp_path, layout, what), wanted)
        assert max(distance.values()) <= tolerance, (what, distance)


def test_metrics_tell_the_depth_and_what_it_costs(train: Train, recurrent: dict, recipe: dict) -> None:
    """Those of the draws themselves; the loss by depth adds up to the loss."""
    recurrent = with_curriculum(recurrent)
    metrics = train("metrics", changes={**recurrent, "logging": {**recipe["logging"], "peak_tflops": 0.001}})
    model = RecurrentConfig(**recurrent["model"], vocab_size=320)
    for one in metrics:
        step = one["step"] - 1
        loader = Loader(None, recipe_from_dict(PretrainRecipe, {**recipe, **recurrent}).training, 0, 1, 8)
        draws = take_batch(loader, iter([]), step, 1234, model).draws
        assert one["depth"] == sum(draw["recurrences"] for draw in draws) / 4
        assert len(draws) == 4 and one["depth_mean"] == min(3, max(1, -(-3 * step // 4)))
        assert all(draw["backprop"] == min(2, one["depth_mean"], draw["recurrences"]) for draw in draws)
        assert one["tflops_per_device"] == pytest.approx(1e9 * one["mfu"] * 1e-12)
        flops = model_flops_per_token(model, 32, model.passes(one))
        assert one["tflops_per_device"] == pytest.approx(one["tokens_per_s"] * flops / 1e12, rel=1e-6)
        groups = {name: value for name, value in one.items() if name.startswith("depth_loss/")}
        assert (
            groups
            and min(groups.values()) <= one["loss"] * (1 + 1e-9)
            and max(groups.values()) >= one["loss"] * (1 - 1e-9)
        )
        assert one["state_norm"] > 0 and one["state_change"] > 0


def test_depths_are_the_same_on_all_ranks_and_others_in_every_step() -> None:
    training = recipe_from_dict(PretrainRecipe, {"data": {"mock": True}}).training
    model = RecurrentConfig(vocab_size=300)
    loaders = [Loader(None, training, rank, 2, 8) for rank in (0, 1)]
    first, second = (take_batch(loader, iter([]), 7, 1, model) for loader in loaders)
    assert first.draws == second.draws and first.seeds != second.seeds
    assert first.draws != take_batch(loaders[0], iter([]), 8, 1, model).draws
    assert first.draws != take_batch(loaders[0], iter([]), 7, 2, model).draws
    assert len({draw["seed"] for draw in first.draws}) == len(first.draws) == 4
    fixed = take_batch(loaders[0], iter([]), 7, 1, model, training=False).draws
    assert fixed == ({"recurrences": 4, "backprop": 0, "mean_recurrences": 4, "seed": 0},) * 4


def test_a_killed_run_resumes_to_the_bit(
    train: Train, recurrent: dict, recipe: dict, tmp_path: Path, workers: Workers
) -> None:
    changes = {**with_curriculum(recurrent), "checkpoint": {"save_interval": 5}}
    unbroken = train("unbroken", changes=changes)
    path, folder = tmp_path / "killed.yaml", tmp_path / "killed"
    path.write_text(yaml.safe_dump({**recipe, **changes, "run": {"output_dir": str(folder)}}))
    workers.run_and_kill(PRETRAIN, [str(path)], lambda: (folder / "checkpoints/step_00000005").exists())
    assert len((folder / "metrics.jsonl").read_text().splitlines()) < 10
    resumed = train("killed", changes=changes)
    exact = ("step", "loss", "grad_norm", "depth", "depth_backprop", "state_norm", "state_change", "tokens")
    assert [[one[name] for name in exact] for one in resumed] == [[one[name] for name in exact] for one in unbroken]


def test_muon_updates_the_adapter(train: Train, recurrent: dict, recipe: dict, tmp_path: Path) -> None:
    """As the first Muon does, with torch.optim.Muon as the reference of one step."""
    optimizer = {
        "name": "muon", "learning_rate": 1e-3, "adam_learning_rate": 5e-5, "weight_decay": 0.0, "clip_grad": 0.0,
        "muon_coefficients": "simple", "muon_scale": "shape_scaling", "muon_scale_factor": 1.0,
        "muon_matmul_precision": "highest",
    }  # fmt: skip
    changes = {**recurrent, "optimizer": optimizer, "parallel": {"distributed_optimizer": False}}
    changes["training"] = {**recurrent["training"], "num_steps": 1}
    changes["optimizer"] |= {"schedule": "constant"}
    train("muon", program=GRADIENT_WORKER, changes=changes)
    key = "decoder.adapter.weight"
    after, gradient = gathered(tmp_path, "muon", "weights")[key], gathered(tmp_path, "muon")[key]
    nothing = {**changes, "optimizer": {**optimizer, "learning_rate": 1e-12, "adam_learning_rate": 1e-12}}
    train("start", program=GRADIENT_WORKER, changes=nothing)
    parameter = torch.nn.Parameter(gathered(tmp_path, "start", "weights")[key])
    parameter.grad = gradient
    torch.optim.Muon([parameter], lr=1e-3, weight_decay=0.0, momentum=0.95, nesterov=True).step()
    torch.testing.assert_close(after, parameter.detach(), rtol=0, atol=2e-5)
