"""The model that the engines open: the checkpoint to start from, as a Hugging Face folder in the run folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tpt.config.load import read_yaml
from megatron_tpt.errors import UserError, require
from megatron_tpt.files import free_space, real_path
from megatron_tpt.generation import EngineOptions
from megatron_tpt.training.history import newest_recipe
from megatron_tpt.units import GIB

if TYPE_CHECKING:
    from megatron_tpt.recipes.rl import RLRecipe


def engine_folder(recipe: "RLRecipe") -> Path:
    """RUN/engine: weights, and the tokenizer by which engine and trainer encode alike."""
    return recipe.run.output_dir / "engine"


def engine_options(recipe: "RLRecipe") -> EngineOptions:
    """The engine of each process."""
    rollouts = recipe.rollouts
    return EngineOptions(
        str(real_path(engine_folder(recipe))),
        max_model_len=recipe.training.sequence_length,
        dtype=recipe.training.dtype,
        kind=rollouts.engine,
        max_num_seqs=rollouts.max_num_seqs,
        endpoints=tuple(rollouts.endpoints) if rollouts.engine == "endpoint" else (),
        endpoint_patience_s=rollouts.patience_s,
        gpu_memory=rollouts.gpu_memory,
        weight_transfer=rollouts.weight_transfer if rollouts.has_servers else None,
        weights_dir=real_path(rollouts.weights_dir or recipe.run.output_dir / "engine-weights"),
    )


def describe_engine(recipe: "RLRecipe") -> str:
    """What samples, and how it gets the weights, in a line for a dry run."""
    rollouts, options = recipe.rollouts, engine_options(recipe)
    if not rollouts.has_servers:
        return f"rollouts: {rollouts.engine} in every process"
    servers = ", ".join(rollouts.endpoints) or "a vLLM server for every process"
    if options.weights_dir is None or rollouts.weight_transfer != "folder":
        return f"rollouts: {servers}; weights by {rollouts.weight_transfer}"
    num_bytes = recipe.model.num_parameters() * (4 if recipe.training.dtype == "float32" else 2)
    place, free = free_space(options.weights_dir)
    verdict = "" if num_bytes <= free else ": NOT ENOUGH; see rollouts.weights_dir"
    return (
        f"rollouts: {servers}; weights by files, {num_bytes / GIB:.2f} GiB; {free / GIB:.2f} GiB are free at {place}"
        f"{verdict}"
    )


def is_prepared(recipe: "RLRecipe") -> bool:
    """Whether it is there."""
    return (engine_folder(recipe) / "config.json").is_file()


def prepare_engine_folder(recipe: "RLRecipe") -> None:
    """Export the start, if it is not there; processes of several machines may do so at once. Raises UserError where
    that of another start is there, and no checkpoint says that the run has begun."""
    from megatron_tpt.interop.hf_export import export_hf
    from megatron_tpt.interop.options import ExportOptions

    if is_prepared(recipe):
        _require_same_start(recipe)
        return
    try:
        export_hf(ExportOptions(recipe.start, engine_folder(recipe), recipe.training.dtype))
    except (FileExistsError, UserError):
        if not is_prepared(recipe):
            raise


def _require_same_start(recipe: "RLRecipe") -> None:
    folder = recipe.run.output_dir
    path = folder / "rollouts/recipe.yaml"
    if newest_recipe(folder) is not None or not path.exists():
        return
    before = read_yaml(path)["training"]["init_from"]
    require(
        before == str(recipe.start),
        f"{engine_folder(recipe)} is of training.init_from={before}, and the recipe has {recipe.start}: remove "
        f"{folder}, which has no checkpoint, or start in another run.output_dir",
    )
