"""Build the sample indices of a recipe ahead of its training: no GPUs, no process groups.

python tools/build_cache.py RECIPE.yaml [--cache-dir FOLDER] [--section.key=value ...]

The recipe and the overrides must be those of the training: the indices depend on the data, the seed, the sequence
length and the number of samples (training.num_steps x training.global_batch_size). It may run on many machines at once.
"""

import sys
import time

from megatron_tpt.config.cli import as_called, program


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(as_called(__doc__ or ""))
        return
    from megatron_tpt.config.load import check, load_recipe
    from megatron_tpt.config.recipe import PretrainRecipe

    # The option is the recipe's field under a shorter name.
    argv = [argument.replace("--cache-dir", "--data.cache_dir", 1) for argument in sys.argv[1:]]
    recipe, _ = load_recipe(PretrainRecipe, argv)
    check(recipe, recipe.parallel.model_parallel_size)
    from megatron_tpt.training.blend import describe_data, with_data_of_run
    from megatron_tpt.training.data import prepare_cache

    recipe = with_data_of_run(recipe)

    print(describe_data(recipe), flush=True)
    started = time.monotonic()
    prepare_cache(recipe)
    print(f"built or found whole in {time.monotonic() - started:.1f} s")


command = program(main)

if __name__ == "__main__":
    command()
