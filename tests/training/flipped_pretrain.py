"""Pre-trains as megatron_tpt.pretrain does, but a bit of one weight of one rank flips, as faulty memory would have it.

The argument --flip=RANK:STEP:NAME says which: the lowest bit of the first weight of the parameter, after that step.
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
from megatron_tpt.training.trainer import Callback, StepReport, Trainer


class Flip(Callback):
    def __init__(self, rank: str, step: str, name: str) -> None:
        self.rank, self.step, self.name = int(rank), int(step), name

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if trainer.step == self.step and torch.distributed.get_rank() == self.rank:
            weights = trainer.gpts[0].get_parameter(self.name).detach().view(-1)
            weights[:1].view(torch.int32).bitwise_xor_(1)


def main() -> None:
    option = next(argument for argument in sys.argv if argument.startswith("--flip="))
    recipe = prepare(*load_recipe(PretrainRecipe, [argument for argument in sys.argv[1:] if argument != option]))
    with distributed(recipe, before=prepare_cache):
        flip = Flip(*option.removeprefix("--flip=").split(":"))
        Trainer(recipe, build_pretrain_data(recipe), [*default_callbacks(), flip]).fit()


if __name__ == "__main__":
    run(main)
