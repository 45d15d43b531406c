"""Trains as megatron_tpt.pretrain does, and writes the gradients of the first step beside the run folder.

Each rank writes its pieces with their places in the whole, as the checkpoint's own description of the model names them.
"""

import sys

import torch

from megatron_tpt.config.cli import run
from megatron_tpt.config.load import load_recipe
from megatron_tpt.config.recipe import PretrainRecipe
from megatron_tpt.training.callbacks import default_callbacks
from megatron_tpt.training.checkpoint import weights_state
from megatron_tpt.training.data import build_pretrain_data, prepare_cache
from megatron_tpt.training.launch import distributed, prepare
from megatron_tpt.training.trainer import Trainer

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


def gradient_pieces(gpts: list[torch.nn.Module]) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """(key, global shape, offset, gradient) of everything that this rank holds."""
    gradients = {parameter.data_ptr(): parameter.main_grad for gpt in gpts for parameter in gpt.parameters()}
    pieces = []
    for entry in (entry for piece in weights_state(gpts).values() for entry in piece.values()):
        shards = [entry]
        if isinstance(entry, ShardedTensorFactory):
            shards = entry.build_fn(entry.key, gradients[entry.data.data_ptr()], entry.replica_id, None)
        for shard in shards:
            assert isinstance(shard, ShardedTensor)
            gradient = shard.data if shard is not entry else gradients[shard.data.data_ptr()]
            gradient = gradient.reshape(shard.data.shape).clone()
            pieces.append((shard.key, shard.global_shape, shard.global_offset, gradient))
    return pieces


def main() -> None:
    recipe = prepare(*load_recipe(PretrainRecipe, sys.argv[1:]))
    with distributed(recipe, before=prepare_cache):
        trainer = Trainer(recipe, build_pretrain_data(recipe), default_callbacks())
        update = trainer.optimizer.step

        def write_gradients_then_update():
            if trainer.step == 0:
                rank = torch.distributed.get_rank()
                torch.save(gradient_pieces(trainer.gpts), f"{recipe.run.output_dir}.gradients-{rank}.pt")
            return update()

        trainer.optimizer.step = write_gradients_then_update
        trainer.fit()


if __name__ == "__main__":
    run(main)
