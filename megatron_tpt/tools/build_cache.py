"""Build the sample indices of a recipe ahead of its training: no GPUs, no process groups.

python tools/build_cache.py RECIPE.yaml [--cache-dir FOLDER] [--section.key=value ...]

The recipe and the overrides must be those of the training: the indices depend on the data, the seed, the sequence
length and the number of samples (training.num_steps x training.global_batch_size). It may run on many machines at once.
"""

import sys
import time

from megatron_tpt.config.cli import as_called, program
from megatron_tpt.logs import print_result


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print_result(as_called(__doc__ or ""))
        return
    from megatron_tpt.config.load import load_recipe
    from megatron_tpt.recipes.pretrain import PretrainRecipe
    from megatron_tpt.training.blend import describe_data

    # The option is the recipe's field under a shorter name.
    argv = [argument.replace("--cache-dir", "--data.cache_dir", 1) for argument in sys.argv[1:]]
    recipe, _ = load_recipe(PretrainRecipe, argv)
    recipe = recipe.resolve()
    recipe.check(recipe.parallel.model_parallel_size)
    print_result(describe_data(recipe))
    started = time.monotonic()
    recipe.prepare_data()
    print_result(f"built or found whole in {time.monotonic() - started:.1f} s")


command = program(main)

if __name__ == "__main__":
    command()
