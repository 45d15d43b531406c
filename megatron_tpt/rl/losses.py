"""Losses of tokens, and the weights that make a loss of a batch of them.

Every loss is per token, of any shape; [B, T] here, where B rows are those of one optimizer step, and T their padded
length. The loss of the step is their weighted sum, divided by its number of tokens:

    weights = token_weights(mask, "token_mean")                       # once, for the rows of all ranks
    loss = weighted_mean(losses, weights, mask.sum())

The trainer divides by the number of tokens itself, so a micro-batch contributes `(losses * weights).sum()`. As the
weights come from the whole batch, gradients do not depend on the split into micro-batches and ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tpt.config.rl import Aggregation, KLEstimator
from megatron_tpt.errors import require

_LOG_RATIO_BOUND = 20.0
"""Beyond it exp() of a log-ratio means no more than "far away", and could overflow. As in verl."""
_K3_BOUND = 10.0
"""As in verl."""


class PolicyLosses(NamedTuple):
    """Losses of tokens, and where they are clipped (bool), of the shape of the log-probabilities."""

    losses: Tensor
    is_clipped: Tensor
    """The ratio has left the clip range in the direction of the advantage: no gradient, but where dual-clipped."""
    is_dual_clipped: Tensor


class ValueLosses(NamedTuple):
    """Losses of tokens, and where the clipped prediction has the larger one (bool)."""

    losses: Tensor
    is_clipped: Tensor


def token_weights(mask: Tensor, aggregation: Aggregation, *, max_length: int | None = None) -> Tensor:
    """The weight of each token's loss, fp32 [B, T], for a mask, bool [B, T], of all tokens of an optimizer step.

    With N tokens in the mask, in S rows that have any, and n in the token's row, the weight is

    - token_mean: 1, so that each token counts the same (DAPO, arXiv 2503.14476, equation 12)
    - sequence_mean_token_mean: N / (S n), each rollout the same (GRPO, arXiv 2402.03300, equation 3)
    - sequence_mean_token_sum: N / S
    - dr_grpo: N / (S max_length), with the limit of a response's length in tokens (arXiv 2503.20783, 3.2)
    """
    lengths = mask.sum(dim=1, keepdim=True)
    per_sequence = lengths.sum() / (lengths > 0).sum().clamp(min=1)
    match aggregation:
        case "token_mean":
            weights = torch.ones_like(per_sequence)
        case "sequence_mean_token_mean":
            weights = per_sequence / lengths.clamp(min=1)
        case "sequence_mean_token_sum":
            weights = per_sequence
        case "dr_grpo":
            assert max_length is not None, "dr_grpo divides by the limit of the length"
            weights = per_sequence / max_length
    return weights.expand(mask.shape).where(mask, 0)


def weighted_mean(losses: Tensor, weights: Tensor, num_tokens: Tensor | int) -> Tensor:
    """The loss of a step from those of its tokens; of a part of its rows, their share of it. `num_tokens` is that of
    the whole step. Losses must be finite at tokens of weight 0, too."""
    return (losses * weights).sum() / num_tokens


def policy_losses(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> PolicyLosses:
    """The clipped surrogate -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with the ratio r of the new policy to the
    old one: PPO, arXiv 1707.06347, equation 7; clip_high above clip_low: DAPO, arXiv 2503.14476, equation 10.

    With `dual_clip` the loss of a token with a negative advantage is at most -dual_clip A: arXiv 1912.09729. Raises
    UserError for a dual_clip of 1 or less, which would also clip the ratio 1.
    """
    require(dual_clip is None or dual_clip > 1, f"dual_clip={dual_clip} must be above 1")
    ratios = (log_probs - old_log_probs).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND).exp()
    unclipped = -advantages * ratios
    clipped = -advantages * ratios.clamp(1 - clip_low, 1 + clip_high)
    losses, is_clipped = torch.maximum(unclipped, clipped), (clipped > unclipped).detach()
    if dual_clip is None:
        return PolicyLosses(losses, is_clipped, torch.zeros_like(is_clipped))
    highest = dual_clip * advantages.abs()  # no loss with a positive advantage is above 0
    return PolicyLosses(torch.minimum(losses, highest), is_clipped, (losses > highest).detach())


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = None) -> ValueLosses:
    """Half the squared error of the critic's values; with `clip`, the larger of that and of the error of the values
    clamped to within `clip` of the old ones (the PPO authors' implementation, openai/baselines ppo2)."""
    errors = (values - returns).square()
    if clip is None:
        return ValueLosses(errors / 2, torch.zeros_like(errors, dtype=torch.bool))
    of_clipped = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return ValueLosses(torch.maximum(errors, of_clipped) / 2, (of_clipped > errors).detach())


def kl_estimates(log_probs: Tensor, reference_log_probs: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimates, at sampled tokens, of the KL divergence of the policy from the reference, in nats; with log-ratio
    d = log policy - log reference (J. Schulman, joschu.net/blog/kl-approx.html):

    - k1: d, unbiased; negative at some tokens. Its gradient is 0 on average: for rewards, not for the loss.
    - k2: d^2 / 2, biased; in the loss its gradient is that of the KL divergence.
    - k3: exp(-d) + d - 1, unbiased and never negative; GRPO's, arXiv 2402.03300, equation 4. At most 10. Its
      gradient is, on average, that of the divergence of the reference from the policy.
    - k1+, k3+: the value of k1 or k3 with the gradient of k2.
    """
    match estimator:
        case "k1+" | "k3+":
            k2 = kl_estimates(log_probs, reference_log_probs, "k2")
            value = kl_estimates(log_probs, reference_log_probs, "k1" if estimator == "k1+" else "k3")
            return k2 + (value - k2).detach()
        case "k1":
            return log_probs - reference_log_probs
        case "k2":
            return (log_probs - reference_log_probs).square() / 2
        case "k3":
            opposite = (reference_log_probs - log_probs).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
            return (opposite.exp() - opposite - 1).clamp(max=_K3_BOUND)


def penalized_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Rewards of tokens, [B, T], minus the KL penalty of each token of the mask: InstructGPT, arXiv 2203.02155,
    equation 2. Without a gradient."""
    return rewards - coefficient * kl.detach().where(mask, 0)


def regularized_losses(
    losses: Tensor,
    *,
    kl: Tensor | None = None,
    kl_coefficient: float = 0.0,
    entropies: Tensor | None = None,
    entropy_coefficient: float = 0.0,
) -> Tensor:
    """Adds a KL term to the losses of tokens, and subtracts an entropy bonus (nats): arXiv 1602.01783, section 4. To be
    called after the correction of policy losses (mismatch.py), which does not apply to these terms."""
    if kl is not None:
        losses = losses + kl_coefficient * kl
    if entropies is not None:
        losses = losses - entropy_coefficient * entropies
    return losses
