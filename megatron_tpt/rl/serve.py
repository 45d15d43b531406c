"""Serve a recipe's policy to its rollouts: one vLLM server, on all GPUs that this process may use, or on the CPU.

    OPENAI_API_KEY=SECRET python -m megatron_tpt.rl.serve PORT RECIPE.yaml [--section.key=value ...]

For `rollouts.engine=endpoint`. Start it with the recipe and options of the training, which needs the same key in its
environment; the order does not matter. Start it again when it ends: the training sends it the weights again.
slurm/train.sbatch does both.
"""

import os
import sys
from dataclasses import replace

import megatron_tpt.interrupts  # noqa: F401  (first: the others take time)
from megatron_tpt.config.cli import program
from megatron_tpt.config.load import load_recipe
from megatron_tpt.errors import UserError, require
from megatron_tpt.generation.vllm_command import device_groups, num_gpus, server_command
from megatron_tpt.recipes.rl import RLRecipe
from megatron_tpt.rl.start import engine_options, prepare_engine_folder


def main() -> None:
    """Export the model, if that is not done, and become the keeper of the server, of which nothing then outlives it."""
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        raise UserError("usage: python -m megatron_tpt.rl.serve PORT RECIPE.yaml [--section.key=value ...]")
    recipe, _ = load_recipe(RLRecipe, sys.argv[2:])
    recipe = recipe.resolve()
    require(
        recipe.rollouts.engine == "endpoint",
        f"rollouts.engine={recipe.rollouts.engine} does not ask a server that runs already: give "
        f"rollouts.engine=endpoint here and where the training runs",
    )
    recipe.check_servers()
    options = replace(engine_options(recipe), kind="vllm-server", endpoints=(), tensor_parallel_size=num_gpus() or 1)
    key = os.environ.get(options.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"set {options.api_key_env} to a secret here and where the training runs: who has it can run code"
        )
    prepare_engine_folder(recipe)
    command, environment = server_command(options, device_groups(options)[0], "0.0.0.0", int(sys.argv[1]), key)
    keeper = [sys.executable, "-m", "megatron_tpt.generation.keeper", str(os.getppid())]
    os.execve(keeper[0], [*keeper, *command], environment)


command = program(main)

if __name__ == "__main__":
    command()
