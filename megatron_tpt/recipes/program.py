"""The training programs, for all kinds of recipes: check and describe a recipe, set up the process groups, train.

torch is not imported until a recipe has passed all checks.
"""

import logging
import os
from collections.abc import Sequence

from megatron_tpt.config.load import Arguments, load_recipe
from megatron_tpt.indexing.manifest import TokenizerInfo
from megatron_tpt.logs import print_result
from megatron_tpt.recipes.base import TrainingRecipe
from megatron_tpt.training.describe import describe
from megatron_tpt.training.devices import find_device
from megatron_tpt.training.launch import distributed, make_run_folder, require_shared_memory
from megatron_tpt.training.launchers import end_with_torchrun, join_launcher
from megatron_tpt.training.requests import require_no_stop
from megatron_tpt.training.resume import describe_start

logger = logging.getLogger(__name__)


def train(kind: type[TrainingRecipe], argv: Sequence[str]) -> None:
    """Run a training program with these arguments."""
    end_with_torchrun()
    join_launcher()
    recipe = prepare(*load_recipe(kind, argv))
    if recipe is None:  # a dry run
        return

    from megatron_tpt.platform import is_first_rank

    with distributed(recipe, before=kind.prepare_data):
        trainer = recipe.train()
        if is_first_rank():
            print_result(recipe.next_steps(trainer.tokens))


def prepare[R: TrainingRecipe](recipe: R, arguments: Arguments) -> R | None:
    """Check a recipe against its data and the number of processes, before anything is started.

    Returns the resolved recipe, or None after printing the description of a --dry-run. Raises UserError for what is
    refused; in a dry run only after the description where possible.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.dry_run:
        world_size = arguments.num_processes or max(world_size, recipe.parallel.model_parallel_size)
    recipe = recipe.resolve()
    recipe.check(world_size)
    recipe.check_callbacks(arguments.places)
    tokenizer = recipe.tokenizer(needs_data=not arguments.dry_run)
    if tokenizer is not None:
        recipe.check_tokenizer(tokenizer)
    recipe = recipe.with_vocabulary(tokenizer)
    if not arguments.dry_run:
        _warn(recipe)
        require_shared_memory(recipe.data.num_workers)
        make_run_folder(recipe.run.output_dir)
        require_no_stop(recipe.run.output_dir)
        return recipe
    print_result(describe(recipe, world_size, find_device(arguments.device), arguments.mfu))
    _warn(recipe)
    _describe_data_and_start(recipe, tokenizer)
    return None


def _warn(recipe: TrainingRecipe) -> None:
    """Log the warnings of a recipe. Raises UserError when a data set has no token to learn from."""
    for line in list(recipe.warnings()):
        logger.warning(line)


def _describe_data_and_start(recipe: TrainingRecipe, tokenizer: TokenizerInfo | None) -> None:
    """Print what a recipe reads and where it would start. Raises UserError for what the run would refuse."""
    identity = None
    if missing := recipe.missing_data():
        logger.warning(f"the data is not here: {missing[0]}; it is neither checked nor described")
    else:
        text, identity = recipe.describe_data()
        print_result(text)
    for line in describe_start(recipe, tokenizer, identity):
        print_result(line)
