"""The mini-batches of an iteration: every rollout once in each epoch, with the weights of its tokens."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_tpt.config.rl import Aggregation
from megatron_tpt.rl.experience import Experience
from megatron_tpt.rl.losses import token_weights
from megatron_tpt.rl.mismatch import close_tokens, importance_weights
from megatron_tpt.rl.rows import Packer, shuffled
from megatron_tpt.training.batches import Batch

if TYPE_CHECKING:
    from megatron_tpt.recipes.rl import RLRecipe


class MiniBatches:
    """Makes the batch of a step; the same rollouts under any layout."""

    def __init__(self, recipe: "RLRecipe", packer: Packer) -> None:
        self._recipe = recipe
        self._packer = packer

    def policy(self, experience: Experience, iteration: int, place: int, step: int) -> Batch:
        """The batch of step number `place` of an iteration, which follows `step` others of the run."""
        settings, chosen = self._recipe.algorithm, self._chosen(iteration, place)
        columns = {name: column[chosen] for name, column in experience.columns.items()}
        mask = experience.mask[chosen]
        if settings.mask_truncated:
            mask = mask & ~experience.is_truncated[chosen, None]
        needed = {"old", "advantage", "reference"}
        values = {name: column for name, column in columns.items() if name in needed}
        ratio = (columns["old"], columns["engine"])
        if settings.mismatch == "truncate":
            values["correction"] = importance_weights(
                *ratio, mask, level=settings.mismatch_level, upper=settings.mismatch_upper
            )
        if settings.mismatch == "mask":
            mask = close_tokens(
                *ratio,
                mask,
                level=settings.mismatch_level,
                lower=settings.mismatch_lower,
                upper=settings.mismatch_upper,
            )
        return self._batch(experience, chosen, mask, values, step, settings.aggregation)

    def critic(self, experience: Experience, iteration: int, place: int, step: int) -> Batch:
        """The critic's batch of the same step: the same rollouts, also the truncated ones."""
        chosen = self._chosen(iteration, place)
        values = {name: experience.columns[name][chosen] for name in ("value", "return")}
        return self._batch(experience, chosen, experience.mask[chosen], values, step, "token_mean")

    def _chosen(self, iteration: int, place: int) -> Tensor:
        """The rollouts of a step: consecutive ones of the order of its epoch."""
        recipe, size = self._recipe, self._recipe.training.global_batch_size
        epoch, place = divmod(place, recipe.num_rollouts // size)
        order = shuffled(recipe.num_rollouts, f"{recipe.run.seed}/mini-batches/{iteration}/{epoch}")
        return torch.tensor(order[place * size : (place + 1) * size])

    def _batch(
        self,
        experience: Experience,
        chosen: Tensor,
        mask: Tensor,
        values: dict[str, Tensor],
        step: int,
        aggregation: Aggregation,
    ) -> Batch:
        """Without a token to learn from, the step is skipped."""
        if not mask.any():
            return Batch([], [], 0)
        values["weights"] = token_weights(mask, aggregation, max_length=self._recipe.rollouts.max_new_tokens)
        values["loss_mask"] = mask.float()
        rows = self._packer.rows([experience.samples[b].tokens for b in chosen.tolist()])
        width = rows.mask.shape[1]  # of the longest of these rollouts
        return self._packer.batch(rows, {name: rows.put(one[:, :width]) for name, one in values.items()}, step=step)
