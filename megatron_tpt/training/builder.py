"""Builds a trainer from a recipe: the model with its weights, the optimizer, and the state of a resumed run."""

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_tpt import platform
from megatron_tpt.config.load import to_yaml
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.files import atomic_write
from megatron_tpt.models.precision import describe_kernels
from megatron_tpt.models.spec import build_chunks
from megatron_tpt.objectives.language_modeling import LanguageModeling
from megatron_tpt.objectives.objective import Objective
from megatron_tpt.training.checkpoint_files import newest_whole_checkpoint
from megatron_tpt.training.checkpoint_loading import load_weights
from megatron_tpt.training.data import TrainingData
from megatron_tpt.training.model import Model, TrainedModel
from megatron_tpt.training.model_files import model_files
from megatron_tpt.training.new_tokens import start_new_tokens
from megatron_tpt.training.optimizer import build_optimizer, build_schedule, wrap_model
from megatron_tpt.training.resume import start_warnings
from megatron_tpt.training.trainer import Callback, Trainer, warn

from megatron.core.utils import get_model_config

logger = logging.getLogger(__name__)


def build_trainer(
    recipe: Recipe, data: TrainingData, callbacks: Sequence[Callback], objective: Objective | None = None
) -> Trainer:
    """The trainer of a recipe, resumed if its run folder holds a checkpoint. Needs process groups; writes RUN/run.yaml.
    The default objective is language modeling."""
    platform.seed_everything(recipe.run.seed)
    checkpoints = recipe.run.output_dir / "checkpoints"
    newest = newest_whole_checkpoint(checkpoints, reads_content=recipe.checkpoint.verify)
    model = _build_trained_model(recipe, data, resumes=newest is not None)
    # Read now: when a checkpoint is due, the folder may be gone or hold something else.
    files, notes = model_files(recipe, data.tokenizer_path, newest or recipe.training.init_from)
    objective = objective or LanguageModeling.from_recipe(recipe, data.source_names, data.unmarked_name)
    trainer = Trainer(recipe, model, objective, data, callbacks, model_files=files)
    if newest is not None:
        trainer.resume(newest)
    if platform.is_first_rank():
        with atomic_write(recipe.run.output_dir / "run.yaml") as path:
            path.write_text(to_yaml(recipe))
    logger.info("\n".join([describe_kernels(get_model_config(model.chunks[0])), *notes]))
    return trainer


def _build_trained_model(recipe: Recipe, data: TrainingData, *, resumes: bool) -> TrainedModel:
    """The model with its initial weights; if the run resumes, those of its checkpoint are loaded later."""
    start = recipe.training.init_from
    seed = recipe.run.seed if start is None and not resumes else None
    gpts = build_chunks(recipe.model, recipe.parallel, recipe.training, seed=seed)
    if start is not None and not resumes:
        warn(start_warnings(recipe, start))
        load_weights(start, gpts)
        start_new_tokens(gpts, recipe, data.tokenizer_path)
    chunks = wrap_model(gpts, recipe)
    optimizer = build_optimizer(chunks, recipe)
    return TrainedModel(chunks, optimizer, build_schedule(optimizer, recipe))


def build_frozen_model(recipe: Recipe, checkpoint: Path) -> Model:
    """The model of a recipe with the weights of a checkpoint, for forward passes only, such as a reference model. Needs
    process groups."""
    gpts = build_chunks(recipe.model, recipe.parallel, recipe.training, seed=None)
    load_weights(checkpoint, gpts)
    for gpt in gpts:
        gpt.requires_grad_(False)
    return Model(gpts)
