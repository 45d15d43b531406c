"""The reference model, whose divergence from the policy is penalized: frozen, or the policy of some iterations ago.

    RUN/reference/step_00000040/   the weights of the policy then, with algorithm.reference_refresh

A refreshed reference is always loaded from there, so that a run that resumes has the same.
"""

import shutil
from typing import TYPE_CHECKING

from megatron_tpt import platform
from megatron_tpt.config.load import to_yaml
from megatron_tpt.errors import UserError
from megatron_tpt.training.builder import build_frozen_model
from megatron_tpt.training.checkpoint_files import (
    delete_old_checkpoints,
    finished_checkpoints,
    step_folder,
    step_number,
)
from megatron_tpt.training.checkpoint_loading import load_weights
from megatron_tpt.training.checkpoint_saving import start_saving
from megatron_tpt.training.model import Model
from megatron_tpt.training.trainer import Trainer

if TYPE_CHECKING:
    from pathlib import Path

    from megatron_tpt.recipes.rl import RLRecipe

_NUM_KEPT = 2
"""The one in use, and the one before, which a roll-back may need."""


class Reference:
    """The reference of a run. All ranks call every method. Needs process groups."""

    def __init__(self, recipe: "RLRecipe", start: "Path", policy: Trainer) -> None:
        self._recipe, self._start, self._policy = recipe, start, policy
        self._model = build_frozen_model(recipe, start)
        self._step = 0  # of the policy whose weights it has; 0 for those it starts with

    def at(self, iteration: int) -> Model:
        """The reference of an iteration. Raises UserError when it was refreshed, and its weights are gone."""
        interval = self._recipe.algorithm.reference_refresh
        step = iteration // interval * interval * self._recipe.steps_per_iteration if interval else 0
        if step != self._step:
            folder = step_folder(self._recipe.run.output_dir / "reference", step)
            if step and self._policy.global_step == step:
                self._save(folder)
            elif step and not folder.is_dir():
                raise UserError(
                    f"{folder} is missing, the reference of the iteration to resume in: restore it, or resume from a "
                    f"checkpoint of step {step} or before (delete later ones)"
                )
            load_weights(folder if step else self._start, self._model.gpts)
            self._step = step
        return self._model

    def _save(self, folder: "Path") -> None:
        """Write the weights of the policy."""
        policy = self._policy
        if platform.is_first_rank():
            for other in finished_checkpoints(folder.parent):
                if step_number(other) >= policy.global_step:  # of steps that are repeated
                    shutil.rmtree(other, ignore_errors=True)
        policy.model.gather_weights()
        start_saving(
            folder,
            policy.model.gpts,
            None,
            {"step": policy.global_step},
            recipe_yaml=to_yaml(self._recipe),
            model_files=policy.model_files,
        ).finish()
        if platform.is_first_rank():
            delete_old_checkpoints(folder.parent, _NUM_KEPT, None)
