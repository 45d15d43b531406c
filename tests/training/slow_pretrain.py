"""Pre-trains as megatron_tpt.pretrain does, but one rank is slow: --slow=RANK:SECONDS:data sleeps as its data source,
--slow=RANK:SECONDS:work in its forward pass."""

import os
import sys
import time

from megatron_tpt.config.cli import run
from megatron_tpt.config.load import load_recipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.training.callbacks import default_callbacks
from megatron_tpt.training.launch import distributed
from megatron_tpt.training.pretrain_data import build_pretrain_data, prepare_cache
from megatron_tpt.training.trainer import Trainer


def main() -> None:
    slow = next(argument for argument in sys.argv if argument.startswith("--slow="))
    rank, seconds, where = slow.removeprefix("--slow=").split(":")
    recipe = prepare(*load_recipe(PretrainRecipe, [argument for argument in sys.argv[1:] if argument != slow]))
    with distributed(recipe, before=prepare_cache):
        data = build_pretrain_data(recipe)
        trainer = Trainer(recipe, data, default_callbacks())
        if os.environ["RANK"] == rank and where == "work":
            trainer.gpts[-1].register_forward_hook(lambda *_: time.sleep(float(seconds)))
        if os.environ["RANK"] == rank and where == "data":
            iterate = data.train.iterate
            data.train.iterate = lambda *steps: (time.sleep(float(seconds)) or batch for batch in iterate(*steps))
        trainer.fit()


if __name__ == "__main__":
    run(main)
