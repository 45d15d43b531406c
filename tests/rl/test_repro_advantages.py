"""Process advantages of each algorithm, against loops over rollouts, and how they are joined with the outcome's."""

import statistics
from types import ModuleType
from typing import Any

import pytest
import torch
from rollout_batches import Rollouts, rollouts
from torch import Tensor

from megatron_tpt.rl.advantages import outcome_advantages
from megatron_tpt.rl.repro import (
    ProcessRewards,
    join,
    normalized_rewards,
    place_rewards,
    process_advantages,
    shuffle_rewards,
)

ALGORITHMS: tuple[Any, ...] = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo")
POSITIONS = ([0, 4, 9], [0, 2, 3, 8], [0, 5], [0, 1, 6, 10], [0, 7], [0], [0, 3, 11], [0, 2, 4, 6], [0, 3, 4])


def process_of(batch: Rollouts) -> ProcessRewards:
    random = torch.Generator().manual_seed(2)
    rewards = torch.randn(len(POSITIONS), 3, generator=random, dtype=torch.float64)
    rewards[1, 1] = 0  # a reward like any other
    return place_rewards(rewards, POSITIONS, batch.mask.shape[1])


def of_segments(batch: Rollouts, process: ProcessRewards, group: int | None = None) -> list[float]:
    """All rewards, or those of a prompt."""
    return [
        process.rewards[row, cut - 1].item()
        for row, cuts in enumerate(POSITIONS)
        for cut in cuts[1:]
        if group is None or batch.groups[row] == group
    ]


def expected_normalized(algorithm: str, batch: Rollouts, process: ProcessRewards) -> Tensor:
    result = torch.zeros_like(process.rewards)
    for row, cuts in enumerate(POSITIONS):
        group = int(batch.groups[row])
        pooled = of_segments(batch, process, None if algorithm == "reinforce_plus_plus" else group)
        is_alone = algorithm != "reinforce_plus_plus" and (batch.groups == group).sum() == 1
        mean, std = (0.0, 1.0) if is_alone else (statistics.mean(pooled), statistics.stdev(pooled))
        divides = algorithm in ("grpo", "ppo", "reinforce_plus_plus")
        for cut in cuts[1:]:
            result[row, cut - 1] = (process.rewards[row, cut - 1] - mean) / (std if divides else 1)
    return result


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rewards_are_normalized_over_kept_segments_alone(algorithm: Any) -> None:
    batch = rollouts()
    process = process_of(batch)
    result = normalized_rewards(algorithm, process, batch.groups)
    torch.testing.assert_close(result, expected_normalized(algorithm, batch, process), rtol=1e-5, atol=1e-5)
    assert not result[~process.is_kept].any()


@pytest.mark.parametrize("algorithm", [one for one in ALGORITHMS if one != "ppo"])
def test_a_token_has_the_rewards_of_its_own_and_later_segments(algorithm: Any) -> None:
    batch = rollouts()
    process = process_of(batch)
    normalized = expected_normalized(algorithm, batch, process)
    result = process_advantages(algorithm, process, batch.mask, batch.groups)
    for row, cuts in enumerate(POSITIONS):
        for token in range(batch.mask.shape[1]):
            expected = sum(normalized[row, cut - 1].item() for cut in cuts[1:] if token < cut)
            assert result[row, token].item() == pytest.approx(expected, abs=1e-5)


def test_process_advantages_of_ppo_go_through_the_critic_as_those_of_verl(verl_core: ModuleType) -> None:
    batch = rollouts()
    process = process_of(batch)
    expected, _ = verl_core.compute_gae_advantage_return(
        normalized_rewards("ppo", process, batch.groups), batch.values, batch.mask.double(), 0.95, 0.9
    )
    result = process_advantages("ppo", process, batch.mask, batch.groups, values=batch.values, gamma=0.95, lam=0.9)
    torch.testing.assert_close(result, expected.where(batch.mask, 0), rtol=1e-6, atol=1e-6)


def test_whitening_is_that_of_verl(verl_core: ModuleType) -> None:
    batch = rollouts()
    process = process_of(batch)
    expected = verl_core.verl_F.masked_whiten(process.rewards, process.is_kept.double()) * process.is_kept
    torch.testing.assert_close(normalized_rewards("reinforce_plus_plus", process, batch.groups), expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_joining_changes_the_policys_advantages_and_not_the_critics_returns(algorithm: Any) -> None:
    batch = rollouts()
    outcome = outcome_advantages(algorithm, batch.rewards, batch.mask, batch.groups, values=batch.values)
    process = process_advantages(algorithm, process_of(batch), batch.mask, batch.groups, values=batch.values)
    joined = join(outcome, process, alpha=0.1)
    assert joined.returns is outcome.returns and (joined.returns is None) == (algorithm != "ppo")
    torch.testing.assert_close(joined.advantages - outcome.advantages, 0.1 * process)
    assert process.any() and torch.equal(join(outcome, process, alpha=0.0).advantages, outcome.advantages)


def test_rewards_that_are_all_the_same_have_no_advantage() -> None:
    """They would have one if the mean contained a 0 for every rollout, as it did where the first cut wrapped around."""
    batch = rollouts()
    rewards = torch.full((len(POSITIONS), 3), 0.2, dtype=torch.float64)
    process = place_rewards(rewards, POSITIONS, batch.mask.shape[1])
    for algorithm in ("reinforce_plus_plus_baseline", "dr_grpo", "reinforce_plus_plus"):
        result = process_advantages(algorithm, process, batch.mask, batch.groups)
        assert result[:-1].abs().max() < 1e-12  # the last rollout is its prompt's only one


@pytest.mark.parametrize("algorithm", [one for one in ALGORITHMS if one != "ppo"])
def test_batches_without_or_with_one_segment_have_no_nan(algorithm: Any) -> None:
    mask, groups = torch.ones(2, 4, dtype=torch.bool), torch.tensor([0, 0])
    for positions in ([[0], [0]], [[0, 2], [0]]):
        process = place_rewards(torch.tensor([[0.5], [0.5]]), positions, num_tokens=4)
        assert process_advantages(algorithm, process, mask, groups).isfinite().all()


def test_shuffled_rewards_are_the_same_ones_of_other_segments() -> None:
    batch = rollouts()
    process = process_of(batch)
    result, again, other = (shuffle_rewards(process, name) for name in ("a", "a", "b"))
    assert torch.equal(result.is_kept, process.is_kept) and not result.rewards[~process.is_kept].any()
    assert sorted(of_segments(batch, result)) == sorted(of_segments(batch, process))
    assert of_segments(batch, result) != of_segments(batch, process) != of_segments(batch, other)
    assert torch.equal(result.rewards, again.rewards) and not torch.equal(result.rewards, other.rewards)
    found = process_advantages("grpo", process, batch.mask, batch.groups, control="shuffled", name="a")
    assert torch.equal(found, process_advantages("grpo", result, batch.mask, batch.groups))


@pytest.mark.parametrize("algorithm", [one for one in ALGORITHMS if one != "ppo"])
def test_constant_rewards_charge_every_segment_as_one_that_does_not_help(algorithm: Any) -> None:
    batch = rollouts()
    process = process_of(batch)
    pooled = of_segments(batch, process)
    divides = algorithm in ("grpo", "reinforce_plus_plus")
    price = statistics.mean(pooled) / (statistics.stdev(pooled) if divides else 1)
    result = process_advantages(algorithm, process, batch.mask, batch.groups, control="constant")
    for row, cuts in enumerate(POSITIONS):
        for token in range(batch.mask.shape[1]):
            assert result[row, token].item() == pytest.approx(-price * sum(token < cut for cut in cuts[1:]), abs=1e-5)
