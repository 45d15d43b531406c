"""The objectives: equal to the pure functions on whole batches, however the rows are split, with gradients."""

from collections.abc import Iterator

import pytest
import torch
from rollout_batches import rollouts
from torch import Tensor

from megatron_tpt import platform
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.rl import AlgorithmConfig
from megatron_tpt.rl.losses import kl_estimates, policy_losses, token_weights, value_losses, weighted_mean
from megatron_tpt.rl.objectives import PolicyObjective, ValueObjective


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with platform.process_groups(ParallelConfig()):
        yield


def microbatch(settings: AlgorithmConfig) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of rows, here the rollouts themselves, and the log-probabilities of their tokens."""
    given = rollouts()
    batch = {
        "labels": torch.zeros(given.mask.shape, dtype=torch.long),
        "loss_mask": given.mask.float(),
        "weights": token_weights(given.mask, settings.aggregation, max_length=20).float(),
        "old": given.old_log_probs.float(),
        "advantage": given.advantages.float(),
        "reference": (given.old_log_probs - 0.3).float(),
        "value": given.values.float(),
        "return": given.rewards.float(),
    }
    return batch, given.log_probs.detach().float().clamp(max=-0.01).requires_grad_()


def logits_of(log_probs: Tensor) -> Tensor:
    """Logits of two tokens, of which the first has these log-probabilities, and of rows that pad the vocabulary."""
    others = torch.log(-torch.expm1(log_probs))
    return torch.stack([log_probs, others, *[torch.full_like(log_probs, 5.0)] * 2], dim=-1)


def expected_loss(settings: AlgorithmConfig, batch: dict[str, Tensor], log_probs: Tensor) -> Tensor:
    losses = policy_losses(
        log_probs, batch["old"], batch["advantage"], clip_low=settings.clip_low, clip_high=settings.clip_high
    ).losses
    losses = losses + settings.kl_coefficient * kl_estimates(log_probs, batch["reference"], settings.kl_estimator)
    return weighted_mean(losses, batch["weights"], int(batch["loss_mask"].sum()))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean", "dr_grpo"])
def test_loss_and_gradient_of_parts_add_up_to_those_of_the_whole(aggregation: str) -> None:
    settings = AlgorithmConfig(kl="loss", kl_coefficient=0.1, clip_high=0.28, aggregation=aggregation)  # type: ignore[arg-type]
    objective = PolicyObjective(settings, temperature=1.0, vocab_size=2)
    batch, log_probs = microbatch(settings)
    expected = expected_loss(settings, batch, log_probs)
    [gradient] = torch.autograd.grad(expected, log_probs)
    for cuts in ([9], [4, 5], [1, 2, 3, 3]):
        splits = {name: value.split(cuts) for name, value in batch.items()}
        total, tokens, named = torch.zeros(()), torch.zeros(()), dict.fromkeys(objective.sum_names, 0.0)
        for number, part in enumerate(log_probs.split(cuts)):
            loss, sums = objective(logits_of(part), {name: value[number] for name, value in splits.items()})
            assert tuple(sums) == objective.sum_names
            total, tokens = total + loss, tokens + sums["tokens"]
            named = {name: named[name] + float(sums[name]) for name in named}
        torch.testing.assert_close((total / tokens).float(), expected)
        [found] = torch.autograd.grad(total / tokens, log_probs)
        torch.testing.assert_close(found, gradient)
        metrics = objective.metrics(named)
        assert metrics["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
        assert 0 < metrics["clipped"] < 1 and metrics["kl"] > 0 and metrics["update_kl"] > 0


def test_the_correction_of_the_mismatch_scales_the_policy_loss_alone() -> None:
    settings = AlgorithmConfig(kl="loss", kl_coefficient=0.1)
    batch, log_probs = microbatch(settings)
    objective = PolicyObjective(settings, temperature=1.0, vocab_size=2)
    plain = objective(logits_of(log_probs), batch)[1]
    halved = objective(logits_of(log_probs), batch | {"correction": torch.full_like(batch["old"], 0.5)})[1]
    assert float(halved["policy_loss"]) == pytest.approx(float(plain["policy_loss"]) / 2, rel=1e-6)
    assert float(halved["kl"]) == float(plain["kl"])


def test_logits_at_the_temperature_of_sampling() -> None:
    settings = AlgorithmConfig(entropy_coefficient=0.01)
    batch, _ = microbatch(settings)
    logits = torch.randn(*batch["labels"].shape, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    objective = PolicyObjective(settings, temperature=0.5, vocab_size=16)
    loss, sums = objective(logits, batch)
    log_probs = (logits / 0.5).log_softmax(-1)
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    losses = policy_losses(log_probs[..., 0], batch["old"], batch["advantage"]).losses - 0.01 * entropies
    torch.testing.assert_close(loss, (losses * batch["weights"]).sum())
    assert float(sums["entropy"]) == pytest.approx(float((entropies * batch["loss_mask"]).sum()), rel=1e-5)
    ours = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    theirs = torch.autograd.grad((losses * batch["weights"]).sum(), logits)[0]
    torch.testing.assert_close(ours, theirs)


def test_the_critic_is_regressed_on_the_returns() -> None:
    settings = AlgorithmConfig()
    batch, _ = microbatch(settings)
    values = torch.randn(*batch["labels"].shape, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    objective = ValueObjective(clip=0.2)
    loss, sums = objective(values, batch)
    expected = value_losses(values[..., 0], batch["value"], batch["return"], clip=0.2)
    torch.testing.assert_close(loss, (expected.losses * batch["loss_mask"]).sum())
    metrics = objective.metrics({name: float(value) for name, value in sums.items()})
    kept = batch["loss_mask"] > 0
    errors = (values.detach()[..., 0] - batch["return"])[kept]
    variance = batch["return"][kept].var(correction=0)
    assert metrics["explained_variance"] == pytest.approx(float(1 - errors.square().mean() / variance), rel=1e-4)
