"""Resuming with another batch size or sequence length: the recipe records what was consumed before. Imports no torch.

The steps done become stages of training.batch_size_ramp, so that the position in the data follows from the recipe
alone; PretrainRecipe.resolve does the same for changed data, with phases.
"""

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

from megatron_tpt.config.load import read_yaml
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.config.training import BatchSizeStage, TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.training.checkpoint_files import step_number

logger = logging.getLogger(__name__)


def newest_recipe(run_folder: Path) -> Path | None:
    """The recipe.yaml of a run's newest checkpoint, in a folder named after the step."""
    return max((run_folder / "checkpoints").glob("step_*/recipe.yaml"), default=None)


def step_of(recipe_path: Path) -> int:
    """The step of a checkpoint, by the path of its recipe.yaml."""
    return step_number(recipe_path.parent)


def with_batches_of_run[R: Recipe](recipe: R) -> R:
    """The recipe with the batches that the newest checkpoint of its run folder has consumed, if it allows changes.

    Raises UserError for a new run whose recipe says that steps have been done.
    """
    path = newest_recipe(recipe.run.output_dir)
    if path is None and recipe.training.num_steps_done:
        raise UserError(
            "training.batch_size_ramp: sequence_length is of steps that a run has done, and this one is new: remove it"
        )
    if path is None or not recipe.data.allow_change:
        return recipe
    old, new, step = _read_batches(path), recipe.training, step_of(path)
    _warn_of_past(new, old, step)
    if old.sequence_length == new.sequence_length and _stages(old, step, None) == _stages(new, step, None):
        return _with_batches(recipe, old.batch_size_ramp, old.global_batch_size)
    done = [
        dataclasses.replace(stage, sequence_length=stage.sequence_length or old.sequence_length)
        for stage in _stages(old, 0, step)
    ]
    if recipe.packed_prefixes():  # rows are counted, whatever length they are padded to
        done = [dataclasses.replace(stage, sequence_length=new.sequence_length) for stage in done]
    *ramp, _ = _stages(new, step, None)
    return _with_batches(recipe, [*_merged(done), *ramp], new.global_batch_size)


def _with_batches[R: Recipe](recipe: R, ramp: list[BatchSizeStage], global_batch_size: int) -> R:
    training: Any = dataclasses.replace(recipe.training, batch_size_ramp=ramp, global_batch_size=global_batch_size)
    return dataclasses.replace(recipe, training=training)


def _read_batches(path: Path) -> TrainingConfig:
    """The batch settings of a saved recipe; all other settings have their defaults."""
    saved = read_yaml(path).get("training") or {}
    names = ("sequence_length", "global_batch_size", "batch_size_ramp")
    own = {name: saved[name] for name in names if name in saved}
    own["batch_size_ramp"] = [BatchSizeStage(**stage) for stage in own.get("batch_size_ramp", [])]
    return TrainingConfig(**own)


def _warn_of_past(new: TrainingConfig, old: TrainingConfig, step: int) -> None:
    """Warn that a ramp has no effect on steps that were done with other batches."""
    num_past = min(step, sum(stage.num_steps for stage in new.batch_size_ramp))
    given, done = (
        _merged([dataclasses.replace(stage, sequence_length=None) for stage in _stages(one, 0, num_past)])
        for one in (new, old)
    )
    if num_past and given != done:
        sizes = ", ".join(f"{stage.num_steps} x {stage.global_batch_size}" for stage in done)
        logger.warning(
            f"training.batch_size_ramp has no effect on the {num_past} steps that were done with other batch "
            f"sizes ({sizes})"
        )


_ENDLESS = 2**62


def _stages(training: TrainingConfig, begin: int, end: int | None) -> list[BatchSizeStage]:
    """The stages of the steps from `begin` (the number of steps before) to `end`; without `end`, the last stage is an
    endless one of global_batch_size."""
    if end == 0:
        return []
    stages, position = [], 0
    for stage in [*training.batch_size_ramp, BatchSizeStage(_ENDLESS, training.global_batch_size)]:
        own = min(position + stage.num_steps, end or _ENDLESS) - max(position, begin)
        position += stage.num_steps
        if own > 0:
            stages.append(dataclasses.replace(stage, num_steps=own))
    return stages


def _merged(stages: list[BatchSizeStage]) -> list[BatchSizeStage]:
    """The stages with equal neighbours merged."""
    groups = itertools.groupby(stages, key=lambda stage: (stage.global_batch_size, stage.sequence_length))
    return [BatchSizeStage(sum(stage.num_steps for stage in own), *batch) for batch, own in groups]
