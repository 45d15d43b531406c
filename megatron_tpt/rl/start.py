"""The model that the engines open: the checkpoint to start from, as a Hugging Face folder in the run folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tpt.config.load import read_yaml
from megatron_tpt.errors import UserError, require
from megatron_tpt.training.history import newest_recipe

if TYPE_CHECKING:
    from megatron_tpt.recipes.rl import RLRecipe


def engine_folder(recipe: "RLRecipe") -> Path:
    """RUN/engine: weights, and the tokenizer by which engine and trainer encode alike."""
    return recipe.run.output_dir / "engine"


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
