"""Figures of evaluations against independent references: scipy, statsmodels' formulas written out, and counting."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from test_evaluate import sample

from megatron_tpt.evaluation import metrics
from megatron_tpt.evaluation.results import group_answers
from megatron_tpt.grading import Rules


def of(problems: dict[str, list[bool]]) -> list:
    return [sample(name, right, number=i) for name, own in problems.items() for i, right in enumerate(own)]


PROBLEMS = {"a": [True, False, True, True], "b": [False] * 4, "c": [True] * 4, "d": [False, True, False, False]}


def test_the_standard_error_is_the_clustered_one() -> None:
    samples = of(PROBLEMS)
    values = list(metrics.rates(samples).values())
    assert values == [0.75, 0, 1, 0.25]
    # Cluster-robust variance of a mean (Liang and Zeger): sums of residuals by cluster, with the factor G / (G - 1).
    right = np.array([one.correct for one in samples], float).reshape(4, 4)
    sums = (right - right.mean()).sum(axis=1)
    expected = math.sqrt(4 / 3 * (sums**2).sum()) / right.size
    assert metrics.standard_error(values) == pytest.approx(expected)
    assert metrics.standard_error(values[:1]) is None


@pytest.mark.parametrize(("successes", "trials"), [(0, 30), (11, 30), (30, 30), (3, 5)])
def test_the_interval_of_single_samples_is_wilsons(successes: int, trials: int) -> None:
    low, high = metrics.interval([1.0] * successes + [0.0] * (trials - successes))
    # The standard error divides by n - 1, as if there were one trial fewer; at 0 and 1 there is no error to go by.
    own = trials if successes in (0, trials) else trials - 1
    center = stats.norm.ppf(0.975)
    share = successes / trials
    for bound in (low, high):  # Wilson's bounds p solve (share - p)^2 = z^2 p (1 - p) / n
        assert (share - bound) ** 2 == pytest.approx(center**2 * bound * (1 - bound) / own, abs=1e-9)
    assert 0 <= low <= share + 1e-12 and share <= high + 1e-12 <= 1 + 1e-12


@pytest.mark.parametrize("seed", range(2))
def test_intervals_of_clustered_samples_hold_the_truth_as_often_as_they_say(seed: int) -> None:
    generator = np.random.default_rng(seed)
    held = 0
    for _ in range(500):
        difficulty = generator.beta(1, 1, size=60)
        values = generator.binomial(8, difficulty) / 8
        low, high = metrics.interval(list(values))
        held += low <= 0.5 <= high
    assert 0.92 <= held / 500 <= 0.98


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 2), (6, 3, 2), (8, 0, 4), (8, 8, 8), (5, 2, 4), (8, 5, 8)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int, c: int, k: int) -> None:
    right = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(right, k))
    assert metrics.pass_at_k(of({"a": right}), k) == pytest.approx(np.mean([any(subset) for subset in subsets]))


def test_majority_counts_groups_shares_ties_and_ignores_what_has_no_answer() -> None:
    right, wrong, other, none = (-1, True), (0, False), (1, False), (None, False)
    assert metrics.majority_at_k([[right, right, wrong, none]], 4) == 1
    assert metrics.majority_at_k([[right, wrong, none, none]], 4) == 0.5
    assert metrics.majority_at_k([[right, wrong, wrong, other]], 4) == 0
    assert metrics.majority_at_k([[none] * 4, [right] * 4], 4) == 0.5


@pytest.mark.parametrize(("repeats", "tolerance"), [(1, 1e-12), (2, 0.06)])
def test_majority_of_fewer_is_that_of_their_subsets_all_or_drawn(repeats: int, tolerance: float) -> None:
    votes = ([(-1, True)] * 5 + [(0, False)] * 3 + [(1, False), (None, False)]) * repeats
    exact = []
    for subset in itertools.combinations(votes, 4):
        counts = Counter(group for group, _ in subset if group is not None)
        winners = [group for group, count in counts.items() if count == max(counts.values())]
        exact.append((-1 in winners) / len(winners))
    assert metrics.majority_at_k([votes], 4) == pytest.approx(np.mean(exact), abs=tolerance)
    assert metrics.majority_at_k([votes], 4) == metrics.majority_at_k([votes], 4)


def test_the_k_are_powers_of_two_and_all() -> None:
    assert [metrics.sizes(n) for n in (1, 2, 3, 8, 64)] == [[], [2], [2, 3], [2, 4, 8], [2, 4, 8, 16, 32, 64]]


def test_the_difference_of_two_models_is_paired() -> None:
    generator = np.random.default_rng(0)
    first = {str(i): float(value) for i, value in enumerate(generator.random(40))}
    second = {name: value + generator.normal(0.05, 0.1) for name, value in first.items()}
    found = metrics.difference(first, second | {"of the second alone": 1.0})
    assert found is not None and found.num_problems == 40
    names = sorted(first)
    test = stats.ttest_rel([second[name] for name in names], [first[name] for name in names])
    assert found.p_value == pytest.approx(test.pvalue)
    assert found.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    values = [second[name] - first[name] for name in names]
    assert (found.difference, found.stderr) == pytest.approx((np.mean(values), np.std(values, ddof=1) / 40**0.5))
    same = metrics.difference(first, first)
    assert same is not None and (same.difference, same.stderr, same.interval, same.p_value) == (0, 0, None, None)
    assert metrics.difference(first, {}) is None


def test_shares_that_are_equal_but_for_rounding_have_no_spread() -> None:
    for share in (2 / 3, 0.1, 5 / 8):
        assert metrics.standard_error([share] * 30) == 0
        low, high = metrics.interval([share] * 30)
        assert low < share - 0.05 and high > share + 0.05  # as of 30 trials
    thirds = [1 / 3, 2 / 3, 1 / 3], [2 / 3, 1.0, 2 / 3]
    for first, second in (thirds, ([0.0, 0.0], [1.0, 1.0])):
        found = metrics.difference(*({str(i): value for i, value in enumerate(own)} for own in (first, second)))
        assert found is not None and found.difference == pytest.approx(second[0] - first[0])
        assert (found.stderr, found.interval, found.p_value) == (0, None, None)


def test_the_spread_is_over_the_numbers_of_the_samples() -> None:
    means = np.array(list(PROBLEMS.values()), float).mean(axis=0)
    assert metrics.spread(of(PROBLEMS)) == pytest.approx(means.std(ddof=1))
    assert metrics.spread(of({"a": [True], "b": [False]})) is None


def test_answers_are_grouped_as_the_grader_compares_them() -> None:
    texts = [("\\frac{1}{2}", False), ("0.5", False), ("3", False), ("\\frac{2}{4}", False), (None, False), ("7", True)]
    samples = [sample("a", right, None if text else "no answer", number=i) for i, (text, right) in enumerate(texts)]
    import dataclasses

    samples = [dataclasses.replace(one, extracted=text) for one, (text, _) in zip(samples, texts, strict=True)]
    [groups] = group_answers(samples, Rules("math"))
    assert [group for group, _ in groups] == [0, 0, 1, 0, None, -1]
    literals = zip(samples, ("[1,2]", "[1, 2]", "[1 ,2.0]", "not one", None, "[3]"), strict=True)
    [values] = group_answers([dataclasses.replace(one, extracted=text) for one, text in literals], Rules("literal"))
    assert [group for group, _ in values] == [0, 0, 0, 1, None, -1]
    [plain] = group_answers(samples, Rules("exact"))
    assert [group for group, _ in plain] == [0, 1, 2, 3, None, -1]
