"""Pre-trains as megatron_tpt.pretrain does, but one rank's losses of one step are multiplied, as a fault would have it.

The argument --poison=RANK:STEP:FACTOR[:once][:gradients][:noise][:delayed] says which; a factor of nan makes loss and
gradients NaN. With `once` the same batch is not poisoned again; with `gradients` they alone are multiplied; with
`noise` they are a little different every time, as on GPUs; with `delayed` the recipe says that FP8 is scaled from
earlier steps.
"""

import sys

import torch

from megatron_tpt.config.cli import run
from megatron_tpt.config.load import load_recipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.training.callbacks import default_callbacks
from megatron_tpt.training.launch import distributed
from megatron_tpt.training.pretrain_data import build_pretrain_data, prepare_cache
from megatron_tpt.training.trainer import Trainer


def main() -> None:
    poison = next(argument for argument in sys.argv if argument.startswith("--poison="))
    rank, step, factor, *kinds = poison.removeprefix("--poison=").split(":")
    recipe = prepare(*load_recipe(PretrainRecipe, [argument for argument in sys.argv[1:] if argument != poison]))
    with distributed(recipe, before=prepare_cache):
        trainer = Trainer(recipe, build_pretrain_data(recipe), default_callbacks())

        noise: list[float] = []
        if "delayed" in kinds:
            recipe.training.fp8 = "delayed"

        def multiply(module, inputs, losses):
            if trainer.step + 1 != int(step) or torch.distributed.get_rank() != int(rank):
                return None
            if "once" in kinds:
                hook.remove()
            if "noise" in kinds:
                noise.append(1 + 1e-5 * len(noise))
                losses.register_hook(lambda gradients: gradients * noise[-1])
            if "gradients" not in kinds:
                return losses * float(factor)
            losses.register_hook(lambda gradients: gradients * float(factor))

        hook = trainer.gpts[-1].register_forward_hook(multiply)
        trainer.fit()


if __name__ == "__main__":
    run(main)
