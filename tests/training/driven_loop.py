"""A training loop of its own, of five steps: the trainer's model and a frozen reference run forward on every batch, as
reinforcement learning does before an update. Each rank writes the log-probabilities next to the run folder.

The argument --reference=CHECKPOINT says of which weights the reference is.
"""

import itertools
import sys
from pathlib import Path

import torch

from megatron_tpt.config.cli import run
from megatron_tpt.config.load import load_recipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.training.builder import build_frozen_model, build_trainer
from megatron_tpt.training.callbacks import default_callbacks
from megatron_tpt.training.launch import distributed
from megatron_tpt.training.pretrain_data import build_pretrain_data, prepare_cache


def main() -> None:
    option = next(argument for argument in sys.argv if argument.startswith("--reference="))
    recipe = prepare(*load_recipe(PretrainRecipe, [argument for argument in sys.argv[1:] if argument != option]))
    with distributed(recipe, before=prepare_cache):
        trainer = build_trainer(recipe, build_pretrain_data(recipe), default_callbacks())
        reference = build_frozen_model(recipe, Path(option.removeprefix("--reference=")))
        own, theirs = [], []
        with trainer.running():
            for batch in itertools.islice(trainer.batches(), 5):
                own.append(trainer.model.log_probabilities(batch))
                theirs.append(reference.log_probabilities(batch))
                trainer.step(batch)
        assert torch.equal(reference.log_probabilities(batch), theirs[-1]), "the reference has changed"
        path = f"{recipe.run.output_dir}.log-probabilities-{torch.distributed.get_rank()}.pt"
        torch.save({"own": torch.stack(own), "reference": torch.stack(theirs)}, path)


if __name__ == "__main__":
    run(main)
