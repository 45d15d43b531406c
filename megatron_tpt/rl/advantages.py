"""Advantages of the tokens of rollouts.

B is the number of rollouts of all ranks, T their padded length. `rewards`, [B, T], are rewards of tokens: that of an
outcome is at the last token (`outcome_rewards`), a KL penalty at every token. `mask`, bool [B, T], is true at the
tokens of the response: what is given elsewhere is ignored, and results are 0 there. `groups`, integers [B], names the
prompt of each rollout.

All rollouts count in the statistics. To exclude some from the loss, such as truncated ones, remove their tokens from
the mask that the token weights are computed from (losses.py), not from this one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tpt.config.rl import Algorithm


class Advantages(NamedTuple):
    """What the policy and, in PPO, the critic are trained with; [B, T]."""

    advantages: Tensor
    returns: Tensor | None
    """What the critic is to predict; None without a critic."""


class GroupStatistics(NamedTuple):
    """Statistics of the group that each value is in, [N]."""

    mean: Tensor
    """0 for a value that is alone in its group: it has no baseline."""
    std: Tensor
    """The unbiased standard deviation; 1 for a value that is alone."""
    size: Tensor


def outcome_advantages(
    algorithm: Algorithm,
    rewards: Tensor,
    mask: Tensor,
    groups: Tensor,
    *,
    values: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> Advantages:
    """The advantages of `algorithm`. PPO needs the critic's `values`, [B, T]. The discount `gamma` is used by PPO and
    REINFORCE++, `lam` by PPO alone."""
    match algorithm:
        case "grpo" | "dr_grpo":
            return Advantages(grpo(rewards, mask, groups, divide_by_std=algorithm == "grpo"), None)
        case "rloo":
            return Advantages(rloo(rewards, mask, groups), None)
        case "reinforce_plus_plus":
            return Advantages(reinforce_plus_plus(rewards, mask, gamma=gamma), None)
        case "reinforce_plus_plus_baseline":
            return Advantages(reinforce_plus_plus_baseline(rewards, mask, groups), None)
        case "ppo":
            assert values is not None, "PPO has a critic"
            return gae(rewards, values, mask, gamma=gamma, lam=lam)


def grpo(rewards: Tensor, mask: Tensor, groups: Tensor, *, divide_by_std: bool = True, epsilon: float = 1e-6) -> Tensor:
    """(R - mean) / (std + epsilon) of the rollout's group at all its tokens: DeepSeekMath, arXiv 2402.03300, 4.1.2.
    Without the division: Dr. GRPO, arXiv 2503.20783, 3.2."""
    scores = rewards.where(mask, 0).sum(dim=1)
    group = group_statistics(scores, groups)
    centered = scores - group.mean
    return _at_all_tokens(centered / (group.std + epsilon) if divide_by_std else centered, mask)


def rloo(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """R minus the mean of the other rollouts of its group, at all tokens: RLOO, arXiv 2402.14740. Computed as
    (R - mean) n / (n - 1); a rollout that is alone in its group keeps its reward."""
    scores = rewards.where(mask, 0).sum(dim=1)
    group = group_statistics(scores, groups)
    return _at_all_tokens((scores - group.mean) * group.size / (group.size - 1).clamp(min=1), mask)


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Returns, whitened over the tokens of the whole batch: arXiv 2501.03262."""
    return whiten(returns_to_go(rewards, mask, gamma=gamma), mask)


def reinforce_plus_plus_baseline(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """R minus the mean of its group, whitened over the tokens of the whole batch: arXiv 2501.03262."""
    return whiten(grpo(rewards, mask, groups, divide_by_std=False), mask)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 1.0) -> Advantages:
    """Generalized advantage estimation, arXiv 1506.02438, equation 16, from the critic's values [B, T].

    The advantages are whitened over the batch; the returns are advantages + values before that. Tokens outside of the
    mask are skipped: the next value of a token is that of the next token in the mask.
    """
    carried = _scan_back(values.where(mask, 0), (~mask).to(values.dtype))
    next_values = torch.nn.functional.pad(carried[:, 1:], (0, 1))
    errors = (rewards + gamma * next_values - values).where(mask, 0)
    advantages = _scan_back(errors, _decay(mask, gamma * lam, values.dtype)).where(mask, 0)
    return Advantages(whiten(advantages, mask), (advantages + values).where(mask, 0))


def outcome_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """Puts scores [B] of whole rollouts at their last tokens: [B, T]. Every rollout must have a token."""
    num_tokens = mask.shape[1]
    assert mask.any(dim=1).all(), "a rollout has no token that could have its reward"
    last = num_tokens - 1 - mask.flip(1).int().argmax(dim=1)
    return torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).scatter(1, last[:, None], scores[:, None])


def returns_to_go(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """The discounted sums of the rewards of a token and of those after it, [B, T]. Tokens outside of the mask have no
    reward and are not a step of the discount."""
    return _scan_back(rewards.where(mask, 0), _decay(mask, gamma, rewards.dtype)).where(mask, 0)


def whiten(values: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) over the mask, of any shape, with the unbiased variance; 0 elsewhere."""
    kept = values[mask].double()
    centered = kept - kept.mean()
    variance = centered.square().sum() / max(1, len(kept) - 1)
    whitened = (centered / (variance + epsilon).sqrt()).to(values.dtype)
    return torch.zeros_like(values).masked_scatter(mask, whitened)


def group_statistics(values: Tensor, groups: Tensor) -> GroupStatistics:
    """Statistics of the groups of values [N]; `groups`, integers [N], need no order.

    In fp64: the fp32 mean of equal rewards can differ from them in the last bit, and such a difference would be divided
    by little more than epsilon.
    """
    _, member_of = groups.unique(return_inverse=True)
    size = member_of.bincount()

    def mean_of(addends: Tensor, counts: Tensor) -> Tensor:
        sums = torch.zeros(len(size), dtype=torch.float64, device=values.device).index_add(0, member_of, addends)
        return (sums / counts)[member_of]

    mean = mean_of(values.double(), size)
    variance = mean_of((values - mean).square(), (size - 1).clamp(min=1))
    alone = size[member_of] == 1
    mean, std = mean.masked_fill(alone, 0), variance.sqrt().masked_fill(alone, 1)
    return GroupStatistics(mean.to(values.dtype), std.to(values.dtype), size[member_of])


def _at_all_tokens(of_rollouts: Tensor, mask: Tensor) -> Tensor:
    """[B] -> [B, T]."""
    return of_rollouts[:, None].expand(mask.shape).where(mask, 0)


def _decay(mask: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """`factor` at tokens of the mask, 1 at those that are skipped."""
    return torch.ones(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, factor)


def _scan_back(terms: Tensor, decay: Tensor) -> Tensor:
    """x with x_t = terms_t + decay_t x_(t+1), and 0 after the end; [B, T]."""
    results, value = [], torch.zeros_like(terms[:, 0])
    for term, factor in zip(reversed(terms.unbind(1)), reversed(decay.unbind(1)), strict=True):
        value = torch.addcmul(term, factor, value)
        results.append(value)
    return torch.stack(results[::-1], dim=1)
