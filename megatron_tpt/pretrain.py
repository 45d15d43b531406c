"""Pre-train (or mid-train) a model on indexed datasets.

    torchrun --nproc-per-node 2 -m megatron_tpt.pretrain RECIPE.yaml [--section.key=value ...] [--dry-run[=PROCESSES]]

Run the same command again to resume after an interruption. docs/training.md says what a run checks and reports.
"""

import sys

import megatron_tpt.interrupts  # noqa: F401  (first: the others take time)
from megatron_tpt.config.cli import program
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import train


def main() -> None:
    """Read the recipe, check it, train."""
    train(PretrainRecipe, sys.argv[1:])


command = program(main)

if __name__ == "__main__":
    command()
