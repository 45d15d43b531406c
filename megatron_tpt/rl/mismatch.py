"""Correction of the mismatch of trainer and engine, which give a token different probabilities by the same weights.

Rollouts are sampled by the engine, so that a gradient by the trainer's probabilities is off-policy even before the
first update. Either the losses of tokens are multiplied by the truncated ratio of trainer to engine
(`importance_weights`), or tokens and rollouts whose ratio is far from 1 are dropped (`close_tokens`). The metrics
(`mismatch_metrics`) say whether that is needed.

B rollouts of T tokens; `mask`, bool [B, T], is true at the tokens of the response. The log-probabilities, [B, T], are
those of the sampled tokens under the distribution that was sampled from (temperature and all), in nats. The trainer's
are the old ones, of the policy that the rollouts are from.
"""

import math

from torch import Tensor

from megatron_tpt.config.rl import Level
from megatron_tpt.errors import require

_LOG_RATIO_BOUND = 20.0
"""Beyond it a ratio says no more than "far away", and its square could overflow. As in verl."""


def importance_weights(
    trainer: Tensor,
    engine: Tensor,
    mask: Tensor,
    *,
    level: Level = "token",
    upper: float = 2.0,
    lower: float | None = None,
) -> Tensor:
    """The ratio of the trainer's to the engine's probability as a factor of the policy losses, [B, T], detached.

    Truncated at `upper` (TIS: Yao et al. 2025, fengyao.notion.site/off-policy-rl); with `lower`, 0 outside of [lower,
    upper] (IcePop: Ling team 2025, arXiv 2510.18855). 0 outside of the mask. Raises UserError for impossible bounds.
    """
    _check_bounds(lower, upper)
    ratios = _log_ratios(trainer, engine, mask, level).exp().where(mask, 0)
    if lower is None:
        return ratios.clamp(max=upper)
    return ratios.where((ratios >= lower) & (ratios <= upper), 0)


def close_tokens(
    trainer: Tensor, engine: Tensor, mask: Tensor, *, level: Level = "token", lower: float, upper: float
) -> Tensor:
    """The mask, bool [B, T], without the tokens, or the rollouts, whose ratio is outside of [lower, upper].

    Compute the weights of tokens (losses.py) from the result, so that the dropped ones are not counted either. Raises
    UserError for impossible bounds.
    """
    _check_bounds(lower, upper)
    log_ratios = _log_ratios(trainer, engine, mask, level)
    return mask & (log_ratios >= math.log(lower)) & (log_ratios <= math.log(upper))


def mismatch_metrics(trainer: Tensor, engine: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the engine is from the trainer, over the tokens of the mask, of which there is at least one.

    `gap` and `gap_max`: the mean and the largest absolute difference of log-probabilities; `kl` and `kl_k3`:
    two estimates of the KL divergence of the engine from the trainer (the second is never negative), all in nats;
    `chi2`: the mean of the squared ratio minus 1, by which importance weights raise the variance.
    """
    log_ratios = (trainer - engine)[mask].double()
    ratios = log_ratios.clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND).exp()
    gaps = log_ratios.abs()
    return {
        "gap": gaps.mean().item(),
        "gap_max": gaps.max().item(),
        "kl": -log_ratios.mean().item(),
        "kl_k3": (ratios - log_ratios - 1).mean().item(),
        "chi2": ratios.square().mean().item() - 1,
    }


def _log_ratios(trainer: Tensor, engine: Tensor, mask: Tensor, level: Level) -> Tensor:
    """[B, T]; those of a rollout at all its tokens."""
    of_tokens = (trainer - engine).detach().where(mask, 0)
    if level == "token":
        return of_tokens
    of_rollouts = of_tokens.sum(dim=1, keepdim=True)
    if level == "sequence_mean":
        of_rollouts = of_rollouts / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return of_rollouts.expand(mask.shape)


def _check_bounds(lower: float | None, upper: float) -> None:
    require(
        0 < (upper if lower is None else lower) <= upper,
        f"bounds of the ratio of trainer to engine: lower={lower}, upper={upper}; 0 < lower <= upper is needed",
    )
