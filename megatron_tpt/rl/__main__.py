"""Train a policy by reinforcement learning, on prompts whose answers can be verified.

    torchrun --nproc-per-node 2 -m megatron_tpt.rl RECIPE.yaml [--section.key=value ...] [--dry-run[=PROCESSES]]

Run the same command again to resume after an interruption, also inside of an iteration. docs/rl.md says what a run does
and reports.
"""

import sys

import megatron_tpt.interrupts  # noqa: F401  (first: the others take time)
from megatron_tpt.config.cli import program
from megatron_tpt.recipes.program import train
from megatron_tpt.recipes.rl import RLRecipe


def main() -> None:
    """Read the recipe, check it, train."""
    train(RLRecipe, sys.argv[1:])


command = program(main)

if __name__ == "__main__":
    command()
