"""The objectives of the policy and of PPO's critic: losses of tokens (losses.py) with the weights of a whole batch.

A micro-batch has, in addition to what packed rows have (rows.py), these tensors [b, s]: `loss_mask`, the tokens that
count, and `weights`, computed once for the whole step, so that no split of it changes a gradient.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_tpt.config.rl import AlgorithmConfig
from megatron_tpt.objectives.objective import MicroBatch, Needs
from megatron_tpt.objectives.vocab_parallel import token_statistics
from megatron_tpt.rl.losses import kl_estimates, policy_losses, regularized_losses, value_losses


class PolicyObjective:
    """The clipped objective, with KL and entropy terms.

    Further tensors: `old` log-probabilities and `advantage`; `correction`, importance weights of the mismatch of engine
    and trainer, if these are used; `reference` log-probabilities, with a KL term.
    """

    sum_names: tuple[str, ...] = (
        "loss", "tokens", "policy_loss", "update_kl", "clipped", "dual_clipped", "kl", "entropy"
    )  # fmt: skip

    needs: Needs = "logits"

    def __init__(self, settings: AlgorithmConfig, temperature: float, vocab_size: int) -> None:
        """At `temperature` rollouts are sampled, from `vocab_size` tokens."""
        self._settings = settings
        self._temperature = temperature
        self._vocab_size = vocab_size
        self._has_entropy = settings.entropy_coefficient > 0

    def __call__(self, outputs: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        settings, mask, weights = self._settings, batch["loss_mask"], batch["weights"]
        log_probs, entropies = self._statistics(outputs, batch["labels"])
        found = policy_losses(
            log_probs,
            batch["old"],
            batch["advantage"],
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
        )
        of_policy = found.losses * batch["correction"] if "correction" in batch else found.losses
        kl = None
        if settings.kl == "loss":
            kl = kl_estimates(log_probs, batch["reference"], settings.kl_estimator)
        losses = regularized_losses(
            of_policy,
            kl=kl,
            kl_coefficient=settings.kl_coefficient,
            entropies=entropies,
            entropy_coefficient=settings.entropy_coefficient,
        )
        loss = (losses * weights).sum()
        update_kl = kl_estimates(batch["old"], log_probs, "k3")
        zero = torch.zeros_like(mask)
        means = (update_kl, found.is_clipped, found.is_dual_clipped, zero if kl is None else kl)
        sums = [loss, mask.sum(), (of_policy * weights).sum()]
        sums += [(one * mask).sum() for one in (*means, zero if entropies is None else entropies)]
        return loss, {name: one.detach().double() for name, one in zip(self.sum_names, sums, strict=True)}

    def _statistics(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and, where they are in the loss, entropies, [b, s]."""
        logits = outputs if self._temperature == 1 else outputs / self._temperature
        found = token_statistics(logits, labels.view(logits.shape[:-1]), self._vocab_size)
        entropies = found.entropies.view_as(labels) if self._has_entropy else None
        return found.log_probabilities.view_as(labels), entropies

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss` and `policy_loss`, weighted; and means over tokens: `update_kl`, the divergence of the policy from
        that at the start of the iteration (k3); the shares that are `clipped` and `dual_clipped`; `kl` from the
        reference and `entropy`, where they are in the loss."""
        if not sums["tokens"]:
            return {}
        names = ["loss", "policy_loss", "update_kl", "clipped"]
        names += ["dual_clipped"] * (self._settings.dual_clip is not None)
        names += ["kl"] * (self._settings.kl == "loss") + ["entropy"] * self._has_entropy
        return {name: sums[name] / sums["tokens"] for name in names}


class ValueObjective:
    """Half the squared error of the critic's values, clipped. Further tensors: old `value`s, and `return`s."""

    needs: Needs = "logits"
    sum_names: tuple[str, ...] = ("loss", "tokens", "clipped", "returns", "squared_returns", "squared_errors")

    def __init__(self, clip: float | None) -> None:
        self._clip = clip

    def __call__(self, outputs: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        mask, returns = batch["loss_mask"], batch["return"]
        values = outputs.float().view_as(mask)
        found = value_losses(values, batch["value"], returns, clip=self._clip)
        loss = (found.losses * batch["weights"]).sum()
        terms = (found.is_clipped, returns, returns.square(), (values - returns).square())
        sums = [loss, mask.sum(), *((one * mask).sum() for one in terms)]
        return loss, {name: one.detach().double() for name, one in zip(self.sum_names, sums, strict=True)}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss`; the share that is `clipped`; and `explained_variance` of the returns, at most 1."""
        if not (tokens := sums["tokens"]):
            return {}
        variance = sums["squared_returns"] / tokens - (sums["returns"] / tokens) ** 2
        result = {"loss": sums["loss"] / tokens, "clipped": sums["clipped"] / tokens}
        if variance > 0:
            result["explained_variance"] = 1 - sums["squared_errors"] / tokens / variance
        return result
