"""Pre-train (or mid-train) a model on indexed datasets.

    torchrun --nproc-per-node 2 -m megatron_tpt.pretrain RECIPE.yaml [--section.key=value ...] [--dry-run[=PROCESSES]]

Run the same command again to resume after an interruption. docs/training.md says what a run checks and tells.
"""

import sys

import megatron_tpt.interrupts  # noqa: F401  (first: the others take time)
from megatron_tpt.config.cli import program
from megatron_tpt.config.load import load_recipe
from megatron_tpt.config.recipe import PretrainRecipe
from megatron_tpt.training.launch import distributed, prepare
from megatron_tpt.training.launchers import join_launcher


def main() -> None:
    """Read the recipe, check it, train."""
    join_launcher()
    recipe = prepare(*load_recipe(PretrainRecipe, sys.argv[1:]))
    if recipe is None:  # a dry run
        return

    from megatron_tpt.platform import is_first_rank
    from megatron_tpt.training.callbacks import default_callbacks
    from megatron_tpt.training.data import build_pretrain_data, prepare_cache
    from megatron_tpt.training.outcome import next_steps
    from megatron_tpt.training.trainer import Trainer

    with distributed(recipe, before=prepare_cache):
        trainer = Trainer(recipe, build_pretrain_data(recipe), default_callbacks())
        trainer.fit()
        if is_first_rank():
            print(next_steps(recipe, trainer.tokens), flush=True)


command = program(main)

if __name__ == "__main__":
    command()
