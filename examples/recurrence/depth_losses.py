"""A callback: validation losses at several depths, from before the first step on.

callbacks:
  depth_losses:DepthLosses: {recurrences: [1, 2, 4]}

with the folder of this file in PYTHONPATH. It acts every training.validation_interval steps and at the end.
"""

import dataclasses

from megatron_tpt.logs import print_result
from megatron_tpt.platform import is_first_rank
from megatron_tpt.training.trainer import Callback, StepReport, Trainer


class DepthLosses(Callback):
    """Writes `depth_validation_loss/R` for every depth R; without depths, as for a model that has none,
    `depth_validation_loss/1`."""

    def __init__(self, recurrences: list[int] | None = None) -> None:
        self.recurrences = recurrences or []

    def before_training(self, trainer: Trainer) -> None:
        if trainer.global_step == 0:
            self._validate(trainer)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        is_last = trainer.global_step == trainer.recipe.training.num_steps
        if is_last or trainer.global_step % trainer.recipe.training.validation_interval == 0:
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        recipe, losses = trainer.recipe, {}
        try:
            for depth in self.recurrences:  # validation has the depth of the trainer's recipe
                trainer.recipe = dataclasses.replace(
                    recipe, model=dataclasses.replace(recipe.model, test_recurrences=depth)
                )
                losses[f"depth_validation_loss/{depth}"] = trainer.validate()["loss"]
        finally:
            trainer.recipe = recipe
        if not self.recurrences:
            losses["depth_validation_loss/1"] = trainer.validate()["loss"]
        trainer.metrics.write(trainer.global_step, losses)
        if is_first_rank():
            print_result("  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
