"""The model that the engines open: the checkpoint to start from, as a Hugging Face folder in the run folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tpt.errors import UserError

if TYPE_CHECKING:
    from megatron_tpt.recipes.rl import RLRecipe


def engine_folder(recipe: "RLRecipe") -> Path:
    """RUN/engine: weights, and the tokenizer by which engine and trainer encode alike."""
    return recipe.run.output_dir / "engine"


def is_prepared(recipe: "RLRecipe") -> bool:
    """Whether it is there."""
    return (engine_folder(recipe) / "config.json").is_file()


def prepare_engine_folder(recipe: "RLRecipe") -> None:
    """Export the start, if it is not there; processes of several machines may do so at once."""
    from megatron_tpt.interop.hf_export import export_hf
    from megatron_tpt.interop.options import ExportOptions

    if is_prepared(recipe):
        return
    try:
        export_hf(ExportOptions(recipe.start, engine_folder(recipe), recipe.training.dtype))
    except (FileExistsError, UserError):
        if not is_prepared(recipe):
            raise
