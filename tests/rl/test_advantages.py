"""Advantages are those of verl; their edge cases, which verl shares or not."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_batches import GROUPS, LENGTHS, SCORES, rollouts

from megatron_tpt.rl.advantages import (
    group_statistics,
    grpo,
    outcome_advantages,
    outcome_rewards,
    returns_to_go,
    rloo,
    whiten,
)

IN_VERL: dict[Any, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"norm_adv_by_std_in_grpo": True}),
    "dr_grpo": ("grpo", {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("rloo", {}),
    "reinforce_plus_plus": ("reinforce_plus_plus", {}),
    "reinforce_plus_plus_baseline": ("reinforce_plus_plus_baseline", {}),
}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_gaps", [False, True])
@pytest.mark.parametrize("algorithm", IN_VERL)
def test_advantages_are_those_of_verl(algorithm: Any, with_gaps: bool, verl_core: ModuleType) -> None:
    batch = rollouts(with_gaps=with_gaps)
    name, options = IN_VERL[algorithm]
    expected, _ = verl_core.get_adv_estimator_fn(name)(
        token_level_rewards=batch.rewards.clone(),
        response_mask=batch.mask.double(),
        index=batch.prompts,
        config=SimpleNamespace(gamma=0.9),
        **options,
    )
    result = outcome_advantages(algorithm, batch.rewards, batch.mask, batch.groups, gamma=0.9)
    close(result.advantages, expected)
    assert result.returns is None and expected.abs().max() > 0.5


@pytest.mark.parametrize("with_gaps", [False, True])
def test_advantages_and_returns_of_ppo_are_those_of_verl(with_gaps: bool, verl_core: ModuleType) -> None:
    batch = rollouts(with_gaps=with_gaps)
    advantages, returns = verl_core.compute_gae_advantage_return(
        batch.rewards, batch.values, batch.mask.double(), gamma=0.95, lam=0.9
    )
    result = outcome_advantages(
        "ppo", batch.rewards, batch.mask, batch.groups, values=batch.values, gamma=0.95, lam=0.9
    )
    assert result.returns is not None
    close(result.advantages, advantages.where(batch.mask, 0))
    close(result.returns, returns.where(batch.mask, 0))


def test_inputs_are_not_written_to() -> None:
    batch = rollouts()
    before = [one.clone() for one in batch]
    for algorithm in (*IN_VERL, "ppo"):
        outcome_advantages(algorithm, batch.rewards, batch.mask, batch.groups, values=batch.values)
    assert all(map(torch.equal, before, batch))


@pytest.mark.parametrize("algorithm", [*IN_VERL, "ppo"])
def test_what_is_outside_of_the_mask_does_not_matter(algorithm: Any) -> None:
    batch = rollouts(with_gaps=True)
    garbage = torch.full_like(batch.rewards, torch.nan).where(~batch.mask, 0)
    clean, result = (
        outcome_advantages(algorithm, batch.rewards + noise, batch.mask, batch.groups, values=batch.values + noise)
        for noise in (0, garbage)
    )
    assert torch.equal(result.advantages, clean.advantages)
    assert not clean.advantages[~batch.mask].any()
    if clean.returns is not None:
        assert result.returns is not None and torch.equal(result.returns, clean.returns)


def test_an_outcome_is_the_reward_of_the_last_token() -> None:
    mask = rollouts().mask
    scores = torch.tensor(SCORES)
    rewards = outcome_rewards(scores, mask)
    assert torch.equal(rewards.sum(dim=1), scores)
    assert torch.equal(rewards[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1], scores)


def test_the_last_token_is_the_last_of_the_mask() -> None:
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    assert outcome_rewards(torch.tensor([2.0, 3.0]), mask).tolist() == [[0, 0, 2, 0], [0, 3, 0, 0]]


def test_an_outcome_without_a_token_is_refused() -> None:
    with pytest.raises(AssertionError, match="no token"):
        outcome_rewards(torch.ones(2), torch.tensor([[True, False], [False, False]]))


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    batch = rollouts()
    scores, groups = batch.rewards.sum(dim=1), batch.groups
    for row, advantages in enumerate(rloo(batch.rewards, batch.mask, groups)):
        others = [scores[one] for one in range(len(scores)) if groups[one] == groups[row] and one != row]
        advantage = (scores[row] - (sum(others) / len(others) if others else 0)).item()
        close(advantages, torch.full_like(advantages, advantage).where(batch.mask[row], 0))


@pytest.mark.parametrize("score", [0.1, 0.3, 1.0])
def test_equal_rewards_have_no_advantage_at_all(score: float) -> None:
    """In fp32 the mean of equal numbers can be another number, and the standard deviation next to nothing."""
    rewards, mask = torch.full((7, 1), score), torch.ones(7, 1, dtype=torch.bool)
    groups = torch.zeros(7, dtype=torch.long)
    assert not grpo(rewards, mask, groups).any()
    assert not rloo(rewards, mask, groups).any()


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(len(GROUPS))))
def test_the_order_of_rollouts_does_not_matter(order: list[int]) -> None:
    batch = rollouts()
    shuffled = batch._make(one[order] for one in batch)
    for algorithm in (*IN_VERL, "ppo"):
        results = [
            outcome_advantages(algorithm, one.rewards, one.mask, one.groups, values=one.values).advantages
            for one in (batch, shuffled)
        ]
        torch.testing.assert_close(results[1], results[0][order], rtol=1e-12, atol=1e-12)


def test_statistics_of_groups_are_those_of_numpy() -> None:
    values, groups = torch.randn(50, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 4 - 2
    statistics = group_statistics(values, groups)
    for group in groups.unique():
        of_group = values[groups == group].double().numpy()
        close(statistics.mean[groups == group], torch.full((len(of_group),), of_group.mean(), dtype=torch.float32))
        close(statistics.std[groups == group], torch.full((len(of_group),), of_group.std(ddof=1), dtype=torch.float32))


def test_whitened_values_have_mean_0_and_variance_1() -> None:
    batch = rollouts()
    whitened = whiten(batch.values, batch.mask)[batch.mask]
    assert abs(whitened.mean()) < 1e-12 and abs(whitened.var() - 1) < 1e-6


def test_a_single_token_is_whitened_to_0() -> None:
    assert whiten(torch.tensor([[3.0, 5.0]]), torch.tensor([[True, False]])).tolist() == [[0, 0]]


def test_returns_are_discounted_by_tokens_of_the_mask() -> None:
    mask = torch.tensor([[True, False, True, True, False]])
    returns = returns_to_go(torch.tensor([[1.0, 9.0, 2.0, 4.0, 9.0]]), mask, gamma=0.5)
    assert returns.tolist() == [[3, 0, 4, 4, 0]]
