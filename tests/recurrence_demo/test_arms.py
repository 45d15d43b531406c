"""Arms get the tokens or the FLOPs that the recurrent one has."""

import json
from pathlib import Path

import arms
import pytest
import yaml
from arms import ALL_ARMS, NO_CURRICULUM, RECURRENT, STATIC, STATIC_FLOPS

from megatron_tpt.config.load import load_recipe
from megatron_tpt.recipes.finetune import FinetuneRecipe

TOKENS_PER_STEP = 32 * 60
# Of one layer, of the output matrix with its padded rows, of the adapter, and of a layer's two attention products.
LAYER, OUTPUT, ADAPTER = 4 * 64 * 64 + 3 * 64 * 128, 384 * 64, 2 * 64 * 64
ATTENTION = 60 * 64


def flops(iterations: float | None) -> float:
    """Of a step; `iterations` without gradient count a third."""
    layers, adapter = (3, 0.0) if iterations is None else (2 + iterations, iterations * ADAPTER)
    return TOKENS_PER_STEP * 6 * (layers * (LAYER + ATTENTION) + adapter + OUTPUT)


@pytest.fixture
def starts(tmp_path: Path) -> dict[str, Path]:
    """What planning reads of the checkpoints: their recipes."""
    shape = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 300}
    folders = {}
    for start, family in (("recurrent", "recurrent"), ("static", "gpt"), ("random", "recurrent")):
        folders[start] = tmp_path / start
        folders[start].mkdir()
        (folders[start] / "recipe.yaml").write_text(yaml.safe_dump({"model": {"family": family, **shape}}))
    return folders


def test_arms_of_equal_tokens_have_the_steps_of_the_recurrent_one(starts: dict[str, Path]) -> None:
    steps = {arm.name: arms.planned_steps(arm, 320, starts) for arm in ALL_ARMS if arm.budget == "tokens"}
    assert set(steps.values()) == {320} and len(steps) == 4


def test_arms_of_equal_flops_have_the_flops_of_the_recurrent_one(starts: dict[str, Path]) -> None:
    budget = arms.expected_flops(RECURRENT, 320, starts["recurrent"])
    assert arms.expected_flops(STATIC, 320, starts["static"]) == pytest.approx(320 * flops(None))
    for arm in (STATIC_FLOPS, NO_CURRICULUM):
        steps = arms.planned_steps(arm, 320, starts)
        of_one_step = arms.expected_flops(arm, steps, starts[arm.start]) / steps
        assert abs(steps * of_one_step - budget) <= of_one_step / 2 * (1 + 1e-9)
        assert (steps > 320) == (arm is STATIC_FLOPS) and steps != 320


def test_every_arm_has_a_recipe(starts: dict[str, Path]) -> None:
    for arm in ALL_ARMS:
        words = [
            str(arms.HERE / "heal.yaml"),
            f"--training.init_from={starts[arm.start]}",
            "--data.train=[train.jsonl]",
        ]
        recipe, _ = load_recipe(FinetuneRecipe, [*words, *arm.settings(32)])
        recipe.check(world_size=1)
        assert (recipe.model.family == "recurrent") == arm.is_recurrent
        assert recipe.optimizer.decay_steps == 32 and recipe.optimizer.wsd_decay_steps == 10
        assert recipe.optimizer.name == ("adam" if "AdamW" in arm.name else "muon")
        if arm.is_recurrent:
            assert [recipe.model.mean_depth(step) for step in (0, 8)] == ([1, 4] if arm.has_curriculum else [4, 4])


def test_measured_costs_are_those_of_the_depths_that_were_drawn(starts: dict[str, Path], tmp_path: Path) -> None:
    depths = [(3, 3), (5, 4)]
    rows = [
        {"step": step, "loss": 1.0, "tokens": step * TOKENS_PER_STEP, "depth": depth, "depth_backprop": backprop}
        for step, (depth, backprop) in enumerate(depths, start=1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = yaml.safe_load((arms.HERE / "heal.yaml").read_text())
    content["training"] |= {"num_steps": 2, "init_from": str(starts["recurrent"])}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    costs = arms.measured_costs(tmp_path)
    assert (costs["steps"], costs["tokens"]) == (2, 2 * TOKENS_PER_STEP)
    assert costs["flops"] == pytest.approx(flops(3) + flops(4 + 1 / 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(rows[-1]) + "\n")
    with pytest.raises(AssertionError):
        arms.measured_costs(tmp_path)
