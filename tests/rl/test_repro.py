"""Process rewards: the paper's formulas, and the traps that public code fell into."""

import math
from typing import Any

import pandas
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tpt.rl.advantages import returns_to_go
from megatron_tpt.rl.repro import (
    answer_losses,
    curve_scores,
    magnitude,
    moving_average,
    place_rewards,
    segment_rewards,
    stability,
)

CURVES = st.integers(2, 12).flatmap(
    lambda num_points: st.lists(
        st.lists(st.floats(0.0625, 20), min_size=num_points, max_size=num_points), min_size=1, max_size=4
    )
).map(lambda rows: torch.tensor(rows, dtype=torch.float64))  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "score"),
    [(1.5, 0.095), (1, 0.238), (0.8, 0.336), (0.5, 0.538), (0.2, 0.803), (0.05, 0.950), (0, 1.0)],
)
def test_the_magnitude_of_a_ratio_of_losses(ratio: float, score: float) -> None:
    assert magnitude(torch.tensor([[3.0, 3.0 * ratio]]))[0, 1].item() == pytest.approx(score, abs=5e-4)


def test_the_magnitude_rises_as_thinking_helps_and_that_printed_in_the_paper_falls() -> None:
    losses = torch.tensor([[2.0, 1.5, 0.7, 0.1]])
    assert (magnitude(losses).diff(dim=1) > 0).all()
    j = -losses
    printed = ((j - j[:, :1]) / j[:, :1] + 1).tanh() + 1
    assert (printed.diff(dim=1) < 0).all()


def test_an_answer_that_needs_no_thinking_has_a_finite_magnitude() -> None:
    assert magnitude(torch.tensor([[0.0, 0.0, 1.0]])).tolist() == [[1, 1, 0]]


@settings(deadline=None)
@given(CURVES, st.sampled_from([0.01, 0.3, 1.0]))
def test_the_moving_average_is_that_of_pandas(curves: Tensor, weight: float) -> None:
    for curve, result in zip(curves, moving_average(curves, weight), strict=True):
        expected = pandas.Series(curve.tolist()).ewm(alpha=weight, adjust=False).mean()
        assert result.tolist() == pytest.approx(expected.tolist())


@settings(deadline=None)
@given(st.lists(st.permutations([0.1, 0.4, 0.9, 1.1, 2.0, 2.5, 7.0]), min_size=1, max_size=4))
def test_stability_is_kendalls_tau_of_scipy_of_every_beginning(rows: list[list[float]]) -> None:
    """In [0, 1]: a tau that is halved, or shifted by 1/2 alone, is not."""
    result = stability(torch.tensor(rows), ema_weight=1.0)
    for row, scores in zip(rows, result.tolist(), strict=True):
        assert scores[0] == 0.5
        for end in range(2, len(row) + 1):
            tau = scipy.stats.kendalltau(range(end), [-loss for loss in row[:end]]).statistic
            assert scores[end - 1] == pytest.approx((tau + 1) / 2, abs=1e-6)


def test_stability_reaches_both_ends_of_its_scale() -> None:
    curves = torch.tensor([[3.0, 2.0, 1.0, 0.5], [0.5, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    for ema_weight in (1.0, 0.01):
        assert stability(curves, ema_weight)[:, -1].tolist() == [1, 0, 0.5]


def test_slow_averages_hide_that_a_curve_is_not_monotone() -> None:
    """Why the weight of the average is a setting: with the authors' 0.01 this curve counts as perfectly stable."""
    curve = torch.tensor([[3.0, 2.9, 0.5, 2.8, 0.1]])
    assert stability(curve, 1.0)[0, -1].item() == pytest.approx((0.8 + 1) / 2)
    assert stability(curve, 0.01)[0, -1].item() == pytest.approx(1.0)


@settings(deadline=None)
@given(CURVES, st.floats(0, 1))
def test_scores_mix_magnitude_and_stability_and_lie_between_0_and_1(curves: Tensor, weight: float) -> None:
    scores = curve_scores(curves, stability_weight=weight, ema_weight=0.3)
    torch.testing.assert_close(scores, (1 - weight) * magnitude(curves) + weight * stability(curves, 0.3))
    assert ((scores >= 0) & (scores <= 1)).all()


@settings(deadline=None)
@given(CURVES, st.sampled_from(["score", "gain"]))
def test_rewards_telescope(curves: Tensor, first_reward: Any) -> None:
    """What is still to come at segment j is S_m - S_(j-1), for the first S_m, or S_m - S_0."""
    scores = curve_scores(curves)
    rewards = segment_rewards(scores, first_reward)
    still_to_come = returns_to_go(rewards, torch.ones_like(rewards, dtype=torch.bool))
    before = scores[:, :-1].clone()
    if first_reward == "score":
        before[:, 0] = 0
    torch.testing.assert_close(still_to_come, scores[:, -1:] - before, rtol=1e-9, atol=1e-9)


def test_thinking_that_does_not_help_is_rewarded_by_score_and_not_by_gain() -> None:
    scores = curve_scores(torch.full((1, 4), 2.0))
    assert segment_rewards(scores, "score").tolist() == [pytest.approx([1 - math.tanh(1), 0, 0])]
    assert segment_rewards(scores, "gain").tolist() == [[0, 0, 0]]


def test_a_curve_of_one_point_has_no_segments() -> None:
    assert segment_rewards(curve_scores(torch.tensor([[2.0]]))).shape == (1, 0)


def test_the_loss_of_an_answer_is_the_mean_over_its_own_tokens() -> None:
    """Rows of 1 and 3 tokens, whose tokens alternate; a sum would punish long answers."""
    losses = answer_losses(torch.tensor([3.0, 5.0, 4.0, 5.0]), torch.tensor([1, 0, 1, 1]), num_rows=2)
    assert losses.tolist() == [5, 4]


def test_the_first_cut_has_no_reward_and_does_not_wrap_around_to_the_last_token() -> None:
    process = place_rewards(torch.tensor([[0.5, 0.25]]), [[0, 2, 4]], num_tokens=6)
    assert process.rewards.tolist() == [[0, 0.5, 0, 0.25, 0, 0]]
    assert process.is_kept.tolist() == [[False, True, False, True, False, False]]


def test_a_reward_of_0_is_a_reward_and_no_padding() -> None:
    process = place_rewards(torch.tensor([[0.5, 0.0, 0.25]]), [[0, 2, 4, 5]], num_tokens=5)
    assert process.is_kept.sum() == 3 and process.is_kept[0, 3]


def test_padding_of_curves_is_never_a_reward() -> None:
    losses = torch.tensor([[2.0, 1.0, 0.5, 0.1], [2.0, 1.5, 0.0, 0.0]])
    positions = [[0, 2, 3, 6], [0, 4]]
    results = []
    for padding in (0.0, 7.0, torch.nan):
        losses[1, 2:] = padding
        scores = curve_scores(losses, stability_weight=0.2, ema_weight=0.5)
        results.append(place_rewards(segment_rewards(scores), positions, num_tokens=6))
    assert results[0].is_kept.sum(dim=1).tolist() == [3, 1]
    for other in results[1:]:
        assert torch.equal(other.rewards, results[0].rewards) and torch.equal(other.is_kept, results[0].is_kept)
