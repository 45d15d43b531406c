"""The depths of recurrent training have the distribution of the paper's code, and follow from the seed alone."""

import collections
import dataclasses
import functools
import math
import statistics

import pytest
from scipy.integrate import quad
from scipy.stats import norm, poisson

from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.models.recurrent.config import RecurrentConfig
from megatron_tpt.models.recurrent.depth import Depth, draw_depth, scheduled
from megatron_tpt.models.sizes import model_flops_per_token

NUM_DRAWS = 200_000
# Mean depth: E[r], E[without gradient], E[with gradient], median, 95th percentile, measured with the authors' code.
MOMENTS = {
    1: (2.00, 1.00, 1.00, 2, 4),
    4: (5.01, 1.60, 3.41, 4, 11),
    8: (9.00, 2.38, 6.62, 8, 19),
    16: (17.0, 9.28, 7.74, 15, 35),
    32: (32.9, 24.95, 7.98, 29, 67),
}


@functools.cache
def drawn(mean: int) -> list[Depth]:
    return [draw_depth("poisson-lognormal", mean, 8, seed) for seed in range(NUM_DRAWS)]


@pytest.mark.parametrize("mean", [4, 32, *(pytest.param(mean, marks=pytest.mark.slow) for mean in (1, 8, 16))])
def test_moments_are_those_of_the_authors_code(mean: int) -> None:
    draws = drawn(mean)
    totals = sorted(draw.total for draw in draws)
    found = [statistics.fmean(totals)]
    found += [statistics.fmean(draw.without_gradient for draw in draws)]
    found += [statistics.fmean(draw.with_gradient for draw in draws)]
    *moments, median, p95 = MOMENTS[mean]
    assert found == pytest.approx(moments, rel=0.015)
    assert totals[NUM_DRAWS // 2] == median and abs(totals[NUM_DRAWS * 19 // 20] - p95) <= 1
    assert all(draw.with_gradient == min(8, mean, draw.total) for draw in draws)


def test_probabilities_are_those_of_the_mixture() -> None:
    """Against scipy's integral of Poisson probabilities over the log-normal rate."""
    counts = collections.Counter(draw.total for draw in drawn(4))
    for depth in range(1, 12):
        expected, _ = quad(
            lambda z, count=depth - 1: norm.pdf(z) * poisson.pmf(count, math.exp(math.log(4) - 0.125 + 0.5 * z)), -9, 9
        )
        error = math.sqrt(expected / NUM_DRAWS)
        assert counts[depth] / NUM_DRAWS == pytest.approx(expected, abs=5 * error), depth


def test_rates_that_are_too_large_for_one_exponential_are_drawn_too() -> None:
    totals = [draw_depth("poisson-lognormal", 2000, 8, seed).total for seed in range(1000)]
    assert statistics.fmean(totals) == pytest.approx(2001, rel=0.06)


def test_other_distributions() -> None:
    assert {draw_depth("fixed", 12, 8, seed) for seed in range(9)} == {(4, 8)}
    uniform = collections.Counter(draw_depth("uniform", 4, 2, seed).total for seed in range(14_000))
    assert uniform.keys() == set(range(1, 8)) and max(uniform.values()) - min(uniform.values()) < 300


def test_the_curriculum_rises_from_one_to_the_maximum() -> None:
    assert [scheduled("constant", 8, 0, step) for step in (0, 9)] == [8, 8]
    assert [scheduled("linear", 8, 4, step) for step in range(6)] == [1, 2, 4, 6, 8, 8]
    share = [1 - math.sqrt(1 - step / 100) for step in range(100)]
    expected = [max(1, math.ceil(32 * x)) for x in share]
    assert [scheduled("1-sqrt", 32, 100, step) for step in range(100)] == expected
    assert expected[50] < 16 and scheduled("1-sqrt", 32, 100, 100) == 32


def tinyllama(largest: int) -> RecurrentConfig:
    """TinyLlama-1.1B, 4,8,4, and the curriculum of the paper's main runs: 75 % of 50,000 steps."""
    return RecurrentConfig(
        num_layers=16, prelude_layers=4, coda_layers=4, hidden_size=2048, ffn_hidden_size=5632,
        num_attention_heads=32, num_query_groups=4, vocab_size=32000, mean_recurrences=largest,
        depth_curriculum="1-sqrt", depth_curriculum_steps=37_500,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("largest", "flops"), [(4, 3.776e20), (8, 5.975e20), (16, 8.481e20), (32, 1.218e21), (None, 3.048e20)]
)
def test_training_flops_are_those_of_the_paper(largest: int | None, flops: float) -> None:
    """Which counts the blocks alone, at the mean depth of every step of 2^20 tokens; static: all 22 layers, once."""
    if largest is None:
        found = 50_000 * dataclasses.replace(tinyllama(1), num_layers=22).block_flops_per_token(1)
    else:
        model = tinyllama(largest)
        steps_of = collections.Counter(model.mean_depth(step) for step in range(50_000))
        found = sum(count * model.block_flops_per_token(mean) for mean, count in steps_of.items())
    assert found * 2**20 == pytest.approx(flops, rel=1e-3)


def test_unrolled_parameters_are_those_of_the_paper() -> None:
    billions = [tinyllama(4).unrolled_parameters(r) / 1e9 for r in (1, 2, 4, 8, 16, 32)]
    assert billions == pytest.approx([0.705, 1.057, 1.762, 3.171, 5.990, 11.628], abs=1e-3)


def test_operations_follow_the_measured_depth() -> None:
    """The blocks' as the paper counts them, with the norms' weights, a thousandth; ours have the adapter, attention and
    the output matrix on top."""
    model = tinyllama(16)
    deep, shallow = (
        model_flops_per_token(model, 1024, model.passes({"depth": depth, "depth_backprop": min(depth, 8)}))
        for depth in (20, 4)
    )
    h, heads = 2048, 32 * 64
    per_third = 2 * (8 * 1024 * heads + 2 * h * h)  # of one pass forward: attention of 8 layers, and the adapter
    expected = model.block_flops_per_token(20) - model.block_flops_per_token(4) + (3 * 4 + 12) * per_third
    assert deep - shallow == pytest.approx(expected, rel=1e-3)


def test_expected_operations_follow_the_curriculum() -> None:
    model = tinyllama(32)
    early, late = (model.expected_passes(steps)["layer"] for steps in (10, 10_000_000))
    assert early < 4 + 8 * 1.4 + 4 and late == pytest.approx(model.passes()["layer"], rel=0.02)
    assert model.passes()["layer"] == pytest.approx(8 + 8 * (7.98 + 24.95 / 3), rel=0.02)
    assert model.activation_layers == 8 + 8 * 8


@pytest.mark.parametrize(
    ("fields", "reported"),
    [
        ({"prelude_layers": 2}, "leaves no recurrent layer between model.prelude_layers=2"),
        ({"depth_curriculum": "linear"}, "model.depth_curriculum=linear and model.depth_curriculum_steps=0 contradict"),
        ({"backprop_curriculum_steps": 3}, "model.backprop_curriculum=constant and"),
    ],
)
def test_contradictions_are_refused(fields: dict, reported: str) -> None:
    with pytest.raises(UserError) as refusal:
        RecurrentConfig(**fields)
    assert reported in str(refusal.value)


@pytest.mark.parametrize(
    ("parallel", "training", "model", "reported"),
    [
        ({"pipeline_parallel_size": 2}, {}, {}, "parallel.pipeline_parallel_size=2"),
        ({"context_parallel_size": 2}, {}, {}, "parallel.context_parallel_size=2"),
        ({"fsdp": "optim_grads"}, {}, {}, "parallel.fsdp=optim_grads"),
        ({}, {"fp8": "tensorwise"}, {}, "training.fp8=tensorwise"),
        ({}, {"cpu_offload_layers": 1}, {}, "training.cpu_offload_layers=1"),
        ({}, {"recompute": "full"}, {"hidden_dropout": 0.1}, "training.recompute=full"),
        (
            {"overlap_grad_reduce": True},
            {"recompute": "selective", "recompute_modules": ["mlp"]},
            {},
            "training.recompute_modules with mlp",
        ),
    ],
)
def test_what_is_not_supported_is_refused(parallel: dict, training: dict, model: dict, reported: str) -> None:
    with pytest.raises(UserError) as refusal:
        RecurrentConfig(**model).check_layout(ParallelConfig(**parallel), TrainingConfig(**training))
    assert str(refusal.value).startswith(f"{reported} is not supported with model.family=recurrent")
