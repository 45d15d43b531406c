"""The correction of the mismatch of trainer and engine is verl's."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from rollout_batches import rollouts

from megatron_tpt.errors import UserError
from megatron_tpt.rl.losses import policy_losses, token_weights
from megatron_tpt.rl.mismatch import Level, close_tokens, importance_weights, mismatch_metrics


def log_probs(scale: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of trainer and engine, whose log-ratios have a deviation of `scale`; and the mask."""
    batch = rollouts(with_gaps=True)
    return batch.old_log_probs, batch.old_log_probs + scale * batch.advantages, batch.mask


@pytest.mark.parametrize(("lower", "threshold"), [(None, 1.5), (0.6, "0.6_1.5")])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_are_those_of_verl(
    level: Level, lower: float | None, threshold: Any, verl_correction: ModuleType
) -> None:
    trainer, engine, mask = log_probs()
    expected, metrics = verl_correction.compute_rollout_correction_weights(
        trainer - engine, mask.double(), rollout_is=level, rollout_is_threshold=threshold
    )
    result = importance_weights(trainer, engine, mask, level=level, upper=1.5, lower=lower)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert metrics["rollout_is_ratio_fraction_high"] > 0 and 0 < result[mask].mean() != 1


def test_the_mean_ratio_of_a_rollout_is_the_geometric_one() -> None:
    """Ratios of 2 and 1/8: their product is 1/4, its square root 1/2. What is not in the mask does not count."""
    trainer = torch.tensor([[2.0, 0.125, 9.0]]).log()
    weights = importance_weights(
        trainer, torch.zeros(1, 3), torch.tensor([[True, True, False]]), level="sequence_mean", lower=0.4, upper=3
    )
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0]]))


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_ratios_that_would_overflow_do_not(level: Level) -> None:
    trainer, engine = torch.tensor([[0.0, 0.0], [-500.0, -400.0]]), torch.tensor([[-500.0, -400.0], [0.0, 0.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert importance_weights(trainer, engine, mask, level=level, upper=1e30).isfinite().all()
    assert all(map(math.isfinite, mismatch_metrics(trainer, engine, mask).values()))


@pytest.mark.parametrize(
    ("level", "name"), [("token", "token_k1"), ("sequence", "seq_sum_k1"), ("sequence_mean", "seq_mean_k1")]
)
def test_dropped_tokens_are_those_that_verl_drops(level: Level, name: str, verl_correction: ModuleType) -> None:
    """verl bounds the ratio of engine to trainer."""
    trainer, engine, mask = log_probs(0.2 if level == "sequence" else 0.5)
    lower, upper = (0.9, 1.25) if level == "sequence_mean" else (0.6, 1.5)
    expected, _ = verl_correction.compute_rollout_rejection_mask(
        trainer - engine, mask.double(), rollout_rs=name, rollout_rs_threshold=f"{1 / upper}_{1 / lower}"
    )
    result = close_tokens(trainer, engine, mask, level=level, lower=lower, upper=upper)
    assert torch.equal(result, expected.bool())
    assert 0 < result.sum() < mask.sum()


def test_metrics_are_those_of_verl(verl_correction: ModuleType) -> None:
    trainer, engine, mask = log_probs()
    expected = verl_correction.compute_offpolicy_metrics(trainer, engine, mask.double())
    result = mismatch_metrics(trainer, engine, mask)
    for name, in_verl in (("kl", "kl"), ("kl_k3", "k3_kl"), ("chi2", "chi2_token")):
        assert result[name] == pytest.approx(expected[in_verl], abs=1e-6)
    gaps = (trainer - engine)[mask].abs()
    assert (result["gap"], result["gap_max"]) == pytest.approx((gaps.mean().item(), gaps.max().item()))


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_an_engine_that_agrees_is_not_corrected(level: Level) -> None:
    trainer, _, mask = log_probs()
    assert torch.equal(importance_weights(trainer, trainer, mask, level=level), mask.double())
    assert torch.equal(close_tokens(trainer, trainer, mask, level=level, lower=0.99, upper=1.01), mask)
    assert set(mismatch_metrics(trainer, trainer, mask).values()) == {0}


def test_what_the_engine_says_outside_of_the_mask_does_not_matter() -> None:
    trainer, engine, mask = log_probs()
    garbage = engine.masked_fill(~mask, torch.nan)
    for level in ("token", "sequence", "sequence_mean"):
        weights = [importance_weights(trainer, one, mask, level=level) for one in (engine, garbage)]
        assert torch.equal(*weights)
    assert mismatch_metrics(trainer, garbage, mask) == mismatch_metrics(trainer, engine, mask)


def test_weights_have_no_gradient() -> None:
    """They change the measure, and are not an objective."""
    trainer, engine, mask = log_probs()
    assert not importance_weights(trainer.clone().requires_grad_(), engine, mask).requires_grad


def test_dropped_tokens_do_not_count_in_the_mean() -> None:
    """The loss of a batch with dropped tokens is that of a batch without them."""
    trainer, engine, mask = log_probs()
    kept = close_tokens(trainer, engine, mask, lower=0.6, upper=1.5)
    weights = token_weights(kept, "token_mean")
    losses = policy_losses(trainer, engine, torch.ones_like(trainer)).losses
    mean = (losses * weights).sum() / kept.sum()
    torch.testing.assert_close(mean, losses[kept].mean())


@pytest.mark.parametrize(("lower", "upper"), [(0.0, 2.0), (2.0, 1.0), (None, 0.0), (-1.0, 1.0)])
def test_impossible_bounds_are_refused(lower: float | None, upper: float) -> None:
    trainer, engine, mask = log_probs()
    with pytest.raises(UserError, match="0 < lower <= upper is needed"):
        importance_weights(trainer, engine, mask, lower=lower, upper=upper)
