"""Losses of tokens are those of verl and TRL in value and gradient, however a batch is split."""

from collections import defaultdict
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_batches import Rollouts, rollouts
from torch import Tensor

from megatron_tpt.errors import UserError
from megatron_tpt.rl.losses import (
    KLEstimator,
    kl_estimates,
    penalized_rewards,
    policy_losses,
    regularized_losses,
    token_weights,
    value_losses,
    weighted_mean,
)

IN_VERL: dict[Any, str] = {
    "token_mean": "token-mean",
    "sequence_mean_token_mean": "seq-mean-token-mean",
    "sequence_mean_token_sum": "seq-mean-token-sum",
    "dr_grpo": "seq-mean-token-sum-norm",
}
MAX_LENGTH = 20  # of a response: more than any has


def with_an_empty_row(batch: Rollouts) -> Rollouts:
    """One whose tokens are all out of the loss, as those of a truncated rollout can be."""
    mask = batch.mask.clone()
    mask[3] = False
    return batch._replace(mask=mask)


def actor_config(**options: Any) -> Any:
    from verl.workers.config import ActorConfig

    return ActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, **options)


def aggregate(losses: Tensor, mask: Tensor, aggregation: Any) -> Tensor:
    return weighted_mean(losses, token_weights(mask, aggregation, max_length=MAX_LENGTH), mask.sum())


def same(actual: Tensor, expected: Tensor, of: Tensor) -> None:
    """Value and gradient."""
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(one, of)[0] for one in (actual, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)
    assert gradients[1].any()


@pytest.mark.parametrize("dual_clip", [None, 3.0, 1.2])
@pytest.mark.parametrize("aggregation", IN_VERL)
def test_policy_loss_and_its_gradient_are_those_of_verl(
    aggregation: Any, dual_clip: float | None, verl_core: ModuleType
) -> None:
    batch = with_an_empty_row(rollouts())
    config = actor_config(
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=dual_clip or 1e6,
        global_batch_info={"loss_scale_factor": MAX_LENGTH},
    )
    weights = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, metrics = verl_core.get_policy_loss_fn("vanilla")(
        batch.old_log_probs, batch.log_probs, batch.advantages, batch.mask.double(),
        loss_agg_mode=IN_VERL[aggregation], config=config, rollout_is_weights=weights,
    )  # fmt: skip
    result = policy_losses(
        batch.log_probs, batch.old_log_probs, batch.advantages, clip_low=0.2, clip_high=0.28, dual_clip=dual_clip
    )
    same(aggregate(result.losses * weights, batch.mask, aggregation), expected, batch.log_probs)
    shares = [one[batch.mask].double().mean().item() for one in (result.is_clipped, result.is_dual_clipped)]
    assert shares == pytest.approx([metrics["actor/pg_clipfrac"], metrics["actor/pg_clipfrac_lower"]], abs=1e-6)
    assert shares[0] > 0.1 and (shares[1] > 0) == (dual_clip is not None)


def reference_of(batch: Rollouts) -> Tensor:
    """Log-probabilities of a reference that is so near that k3 is below its bound, which TRL's does not have."""
    return batch.old_log_probs + 0.3 * batch.advantages


def trl_loss(batch: Rollouts, kind: str, *, beta: float = 0.0, ratios: Tensor | None = None) -> Tensor:
    """TRL's GRPO loss, which is a method, called on a stand-in for its trainer."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    mask = batch.mask.double()
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        reduce=lambda value, reduction="sum": value,
        gather=lambda value: value,
        gather_for_metrics=lambda value: value,
    )
    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        loss_type=kind,
        epsilon_low=0.2,
        epsilon_high=0.28,
        use_vllm=ratios is not None,
        vllm_importance_sampling_correction=ratios is not None,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        accelerator=accelerator,
        max_completion_length=MAX_LENGTH,
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.log_probs, torch.zeros_like(mask), None),
    )
    prompts = torch.zeros(len(mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": prompts + 1,
        "completion_ids": torch.zeros_like(mask).long(),
        "completion_mask": mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_log_probs,
        "ref_per_token_logps": reference_of(batch),
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": ratios,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.slow  # to import it takes longer than all other tests of this file
@pytest.mark.filterwarnings("ignore:TRL currently supports vLLM")
@pytest.mark.parametrize(
    ("aggregation", "kind"),
    [
        ("token_mean", "bnpo"),
        ("token_mean", "dapo"),
        ("sequence_mean_token_mean", "grpo"),
        ("sequence_mean_token_sum", "luspo"),
        ("dr_grpo", "dr_grpo"),
    ],
)
def test_loss_and_its_gradient_are_those_of_trl(aggregation: Any, kind: str) -> None:
    batch = rollouts()
    ratios = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    expected = trl_loss(batch, kind, beta=0.1, ratios=ratios)
    losses = policy_losses(batch.log_probs, batch.old_log_probs, batch.advantages, clip_low=0.2, clip_high=0.28).losses
    losses = regularized_losses(
        losses * ratios, kl=kl_estimates(batch.log_probs, reference_of(batch), "k3"), kl_coefficient=0.1
    )
    same(aggregate(losses, batch.mask, aggregation), expected, batch.log_probs)


@pytest.mark.parametrize("clip", [0.2, 0.5])
def test_value_loss_and_its_gradient_are_those_of_verl(clip: float, verl_core: ModuleType) -> None:
    batch = rollouts()
    values = (batch.values + 0.5 * batch.advantages).detach().requires_grad_()
    returns = batch.values + batch.old_log_probs
    expected, share = verl_core.compute_value_loss(values, returns, batch.values, batch.mask.double(), clip)
    result = value_losses(values, batch.values, returns, clip=clip)
    same(aggregate(result.losses, batch.mask, "token_mean"), expected, values)
    assert result.is_clipped[batch.mask].double().mean().item() == pytest.approx(share.item(), abs=1e-6)
    assert result.is_clipped.any()


def test_value_loss_without_a_clip_is_half_the_squared_error() -> None:
    result = value_losses(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([1.0]))
    assert (result.losses.item(), result.is_clipped.item()) == (2, False)


@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k1+", "k3+"])
def test_kl_estimates_and_their_gradients_are_those_of_verl(
    estimator: KLEstimator, scale: float, verl_core: ModuleType
) -> None:
    """Also where log-ratios are as large as the bounds."""
    batch = rollouts()
    log_probs = (scale * batch.log_probs).detach().requires_grad_()
    estimates = [
        (function(log_probs, batch.old_log_probs, estimator) * batch.advantages)[batch.mask].sum()
        for function in (kl_estimates, verl_core.kl_penalty)
    ]
    same(estimates[0], estimates[1], log_probs)


def test_kl_in_the_reward_is_that_of_verl(verl_core: ModuleType) -> None:
    batch = rollouts()
    kl = kl_estimates(batch.log_probs, batch.values, "k1")
    expected = verl_core.compute_rewards(batch.rewards, batch.log_probs.detach(), batch.values, 0.1)
    result = penalized_rewards(batch.rewards, kl, batch.mask, 0.1)
    torch.testing.assert_close(result[batch.mask], expected[batch.mask])
    assert not result[~batch.mask].any() and not result.requires_grad


def test_the_estimates_average_to_the_divergence() -> None:
    """Over all tokens, with their probabilities: k1 and k3 in value; in gradient k2 and those with a "+", while that of
    k1 is 0 and that of k3 is the gradient of the opposite divergence. All are below the bound of k3."""
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(5, generator=random, dtype=torch.float64).requires_grad_()
    reference = torch.randn(5, generator=random, dtype=torch.float64).log_softmax(0)
    log_probs = logits.log_softmax(0)

    def gradient(average: Tensor) -> Tensor:
        return torch.autograd.grad(average, logits, retain_graph=True)[0]

    divergence = (log_probs.exp() * (log_probs - reference)).sum()
    opposite = (reference.exp() * (reference - log_probs)).sum()
    expected = {
        "k1": torch.zeros_like(logits),
        "k2": gradient(divergence),
        "k3": gradient(opposite),
        "k1+": gradient(divergence),
        "k3+": gradient(divergence),
    }
    assert set(expected) == set(get_args(KLEstimator))
    for estimator in get_args(KLEstimator):
        average = (log_probs.exp().detach() * kl_estimates(log_probs, reference, estimator)).sum()
        torch.testing.assert_close(gradient(average), expected[estimator])
        if estimator != "k2":
            torch.testing.assert_close(average, divergence)


@pytest.mark.parametrize("aggregation", IN_VERL)
def test_entropy_bonus_and_its_gradient_are_those_of_verl(aggregation: Any, verl_core: ModuleType) -> None:
    mask = rollouts().mask
    logits = torch.randn(*mask.shape, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    if aggregation == "dr_grpo":  # verl divides by the padded length here
        mask = torch.nn.functional.pad(mask, (0, MAX_LENGTH - mask.shape[1]))
        logits = torch.nn.functional.pad(logits, (0, 0, 0, MAX_LENGTH - logits.shape[1]))
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    losses = regularized_losses(torch.zeros_like(entropies), entropies=entropies, entropy_coefficient=0.5)
    expected = -0.5 * verl_core.compute_entropy_loss(logits, mask.double(), IN_VERL[aggregation])
    same(aggregate(losses, mask, aggregation), expected, logits)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=7).filter(any),
    aggregation=st.sampled_from(sorted(IN_VERL)),
    data=st.data(),
)
def test_no_split_into_micro_batches_changes_the_gradient(lengths: list[int], aggregation: Any, data: Any) -> None:
    """Micro-batches of any rows, in any order, each padded to its own longest row."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    random = torch.Generator().manual_seed(0)
    features, old, advantages = torch.randn(3, *mask.shape, generator=random, dtype=torch.float64)
    weights = token_weights(mask, aggregation, max_length=MAX_LENGTH)

    def gradient(parts: list[list[int]]) -> Tensor:
        parameter = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        for rows in parts:
            end = max(1, *(lengths[row] for row in rows))
            x, old_of_part, advantages_of_part, weights_of_part = (
                one[rows, :end] for one in (features, old, advantages, weights)
            )
            losses = policy_losses(parameter * x, old_of_part, advantages_of_part).losses
            weighted_mean(losses, weights_of_part, mask.sum()).backward()
        assert parameter.grad is not None
        return parameter.grad

    order = data.draw(st.permutations(range(len(lengths))))
    borders = sorted(data.draw(st.sets(st.integers(1, len(lengths) - 1)))) if len(lengths) > 1 else []
    parts = [order[i:j] for i, j in zip([0, *borders], [*borders, len(order)], strict=True)]
    torch.testing.assert_close(gradient(parts), gradient([list(range(len(lengths)))]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1, 1]),
        ("sequence_mean_token_mean", [4 / (2 * 3), 4 / (2 * 1)]),
        ("sequence_mean_token_sum", [2, 2]),
        ("dr_grpo", [2 / 10, 2 / 10]),
    ],
)
def test_weights_of_a_batch_by_hand(aggregation: Any, expected: list[float]) -> None:
    """Rows of 3, 1 and no tokens: N = 4, S = 2."""
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    weights = token_weights(mask, aggregation, max_length=10)
    assert weights[0].tolist() == pytest.approx([expected[0]] * 3)
    assert weights[1].tolist() == pytest.approx([expected[1], 0, 0])
    assert not weights[2].any()


def test_a_batch_without_tokens_has_no_loss_and_no_nan() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert not any(token_weights(mask, aggregation, max_length=3).any() for aggregation in IN_VERL)


def test_log_ratios_that_would_overflow_do_not() -> None:
    log_probs = torch.tensor([0.0, -500.0]).requires_grad_()
    losses = policy_losses(log_probs, torch.tensor([-500.0, 0.0]), torch.tensor([-1.0, 1.0])).losses
    losses.sum().backward()
    assert log_probs.grad is not None and losses.isfinite().all() and log_probs.grad.isfinite().all()


def test_a_dual_clip_of_1_is_refused() -> None:
    with pytest.raises(UserError, match=r"dual_clip=1.0 must be above 1"):
        policy_losses(torch.zeros(1), torch.zeros(1), torch.ones(1), dual_clip=1.0)
