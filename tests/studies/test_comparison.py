"""Means, paired differences and interactions, against figures that were worked out otherwise."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from megatron_tpt.errors import UserError
from megatron_tpt.studies.comparison import Comparison, Estimate
from megatron_tpt.studies.costs import Spent
from megatron_tpt.studies.study import ReportConfig
from megatron_tpt.studies.table import Row

SEEDS = range(5)


def row(value: float, trials: int | None = None, **levels: object) -> Row:
    named = {name: str(level) for name, level in levels.items()}
    return Row(named, "score", value, trials, Spent(), Path("x.json"), "", "test")


def grid(noise: float = 0.01) -> tuple[list[Row], np.ndarray]:
    """Two factors with effects of 0.2 and 0.1 and an interaction of 0.05, seeds that differ much, little noise."""
    random = np.random.default_rng(7)
    values = np.zeros((2, 2, len(SEEDS)))
    for a, b, seed in itertools.product(range(2), range(2), SEEDS):
        values[a, b, seed] = 0.2 * a + 0.1 * b + 0.05 * a * b + 0.3 * math.sin(seed) + noise * random.normal()
    rows = [
        row(float(values[a, b, seed]), pre="xy"[a], sft="st"[b], seed=seed)
        for a, b, seed in itertools.product(range(2), range(2), SEEDS)
    ]
    return rows, values


def only(estimates: list[Estimate], **what: str) -> Estimate:
    [found] = [one for one in estimates if one.what == what]
    return found


def test_means_have_the_interval_of_student_and_name_their_rows() -> None:
    rows, values = grid()
    mean = only(Comparison(rows, "score", ReportConfig()).means(), pre="y", sft="s")
    own = values[1, 0]
    half = 2.776445 * own.std(ddof=1) / math.sqrt(5)  # t of 4 degrees of freedom, 0.975
    assert (mean.mean, mean.low, mean.high) == pytest.approx((own.mean(), own.mean() - half, own.mean() + half))
    assert mean.rows == (11, 12, 13, 14, 15) and mean.num_replicates == 5
    low = only(Comparison(rows, "score", ReportConfig()).means(), pre="x", sft="s").low
    assert low is not None and low < 0
    shares = [replace(one, value=abs(one.value), trials=100) for one in rows]
    assert only(Comparison(shares, "score", ReportConfig()).means(), pre="x", sft="s").low == 0.0


def test_differences_are_paired_by_seed_in_every_combination_and_in_the_mean() -> None:
    rows, values = grid()
    found = Comparison(rows, "score", ReportConfig()).differences()
    difference = only(found, pre="y - x", sft="t")
    paired = stats.ttest_rel(values[1, 1], values[0, 1])
    interval = paired.confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    mean = only(found, pre="y - x", sft="(mean)")
    each = values[1].mean(axis=0) - values[0].mean(axis=0)
    assert mean.mean == pytest.approx(each.mean()) and mean.low == pytest.approx(
        stats.ttest_1samp(each, 0).confidence_interval().low
    )
    # Seeds differ by more than the arms: without pairing nothing would be seen.
    assert mean.low > 0.15 and stats.ttest_ind(values[1, 1], values[0, 1]).pvalue > 0.05
    assert (
        only(Comparison(rows, "score", ReportConfig(baseline={"pre": "y"})).differences(), pre="x - y", sft="t").mean
        < 0
    )


def test_p_values_are_adjusted_over_their_table() -> None:
    rows, values = grid(noise=0.3)
    found = Comparison(rows, "score", ReportConfig()).differences()
    raw = [
        stats.ttest_rel(values[1, 0], values[0, 0]).pvalue, stats.ttest_rel(values[1, 1], values[0, 1]).pvalue,
        stats.ttest_1samp((values[1] - values[0]).mean(axis=0), 0).pvalue,
        stats.ttest_rel(values[0, 1], values[0, 0]).pvalue, stats.ttest_rel(values[1, 1], values[1, 0]).pvalue,
        stats.ttest_1samp((values[:, 1] - values[:, 0]).mean(axis=0), 0).pvalue,
    ]  # fmt: skip
    # By hand: the i-th smallest of n times n / i, then the running minimum from the largest on.
    order = np.argsort(raw)
    scaled = np.array(raw)[order] * 6 / np.arange(1, 7)
    expected = np.empty(6)
    expected[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    assert [one.p for one in found] == pytest.approx(list(expected))


def test_an_interaction_is_the_difference_of_two_differences() -> None:
    rows, values = grid()
    [found] = Comparison(rows, "score", ReportConfig()).interactions()
    each = values[1, 1] - values[0, 1] - values[1, 0] + values[0, 0]
    assert found.what == {"pre": "y - x", "sft": "t - s"}
    assert found.mean == pytest.approx(each.mean()) and found.low == pytest.approx(
        stats.ttest_1samp(each, 0).confidence_interval().low
    )
    assert found.low < 0.05 < found.high


def test_only_seeds_and_combinations_that_both_arms_have_are_compared() -> None:
    rows, values = grid()
    rows = [one for one in rows if one.levels != {"pre": "y", "sft": "s", "seed": "3"}]
    rows = [one for one in rows if not (one.levels["pre"] == "x" and one.levels["sft"] == "t")]
    found = Comparison(rows, "score", ReportConfig()).differences()
    assert [one.what for one in found] == [{"pre": "y - x", "sft": "s"}, {"pre": "y", "sft": "t - s"}]
    kept = [0, 1, 2, 4]
    assert found[0].num_replicates == 4 and found[0].mean == pytest.approx((values[1, 0] - values[0, 0])[kept].mean())


def test_levels_of_x_are_not_compared_and_not_averaged() -> None:
    rows = [
        row(0.1 * at + (arm == "b") * 0.1 * at + 0.01 * seed * (arm == "b"), arm=arm, at=at, size=size, seed=seed)
        for arm in "ab" for at in (1, 2) for size in "mn" for seed in (0, 1)
    ]  # fmt: skip
    found = Comparison(rows, "score", ReportConfig(x="at")).differences()
    means = [one for one in found if one.what["arm"] == "b - a" and one.what["size"] == "(mean)"]
    assert [(one.what["at"], one.mean) for one in means] == [("1", pytest.approx(0.105)), ("2", pytest.approx(0.205))]
    assert {one.what["at"] for one in found} == {"1", "2"}


def test_results_before_and_after_a_step_are_not_averaged() -> None:
    """Those of the pretrained model have no level of `sft`."""
    rows = [
        row(0.1 * len(sft) + 0.5 * (pre == "y") * bool(sft), pre=pre, sft=sft, seed=seed)
        for pre in "xy" for sft in ("", "s", "tt") for seed in (0, 1)
    ]  # fmt: skip
    found = Comparison(rows, "score", ReportConfig()).differences()
    own = [(one.what["sft"], pytest.approx(one.mean)) for one in found if one.what["pre"] == "y - x"]
    assert own == [("", 0.0), ("s", 0.5), ("tt", 0.5), ("(mean)", 0.5)]


def test_one_seed_has_an_interval_over_its_problems() -> None:
    # Newcombe 1998, table II, example (a), method 10: 56/70 against 48/80.
    rows = [row(48 / 80, 80, arm="a", seed=0), row(56 / 70, 70, arm="b", seed=0)]
    comparison = Comparison(rows, "score", ReportConfig())
    [found] = comparison.differences()
    assert (found.mean, found.low, found.high, found.p) == (
        *map(pytest.approx, (0.2,)),
        *(pytest.approx(v, abs=1e-4) for v in (0.0524, 0.3339)),
        None,
    )
    assert all(one.low < one.mean < one.high for one in comparison.means())
    [bare] = Comparison([row(0.1, arm="a", seed=0), row(0.2, arm="b", seed=0)], "score", ReportConfig()).differences()
    assert bare.low is None and bare.p is None


def test_rows_that_nothing_distinguishes_are_refused() -> None:
    twice = [row(0.1, arm="a", seed=0), row(0.2, arm="a", seed=0)]
    with pytest.raises(UserError, match=r"two rows of score have the levels a, 0: name the fields"):
        Comparison(twice, "score", ReportConfig())


def test_equal_values_have_no_spread_and_no_p_value() -> None:
    rows = [row(value, arm=arm, seed=seed) for arm, value in (("a", 0.25), ("b", 0.75)) for seed in range(3)]
    [found] = Comparison(rows, "score", ReportConfig()).differences()
    assert (found.mean, found.low, found.high, found.p) == (0.5, 0.5, 0.5, None)


def test_differences_that_only_rounding_separates_are_equal() -> None:
    pairs = [(0.2, 0.5), (0.6, 0.9), (0.3, 0.6)]
    assert len({b - a for a, b in pairs}) > 1
    rows = [row(value, arm="ab"[arm], seed=seed) for seed, pair in enumerate(pairs) for arm, value in enumerate(pair)]
    [found] = Comparison(rows, "score", ReportConfig()).differences()
    assert found.mean == pytest.approx(0.3) and found.low == found.high == found.mean and found.p is None
    rows = [row(value + 0.1 * b, arm="ab"[arm], b=b, seed=seed) for seed, pair in enumerate(pairs)
            for arm, value in enumerate(pair) for b in (0, 1)]  # fmt: skip
    [found] = Comparison(rows, "score", ReportConfig()).interactions()
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, None)
