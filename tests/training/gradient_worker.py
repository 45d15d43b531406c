"""Trains as megatron_tpt.pretrain does, and writes the gradients of the first step next to the run folder, and the
weights that it ends with.

Each rank writes its pieces with their places in the whole, as the checkpoint's own description of the model names them.
"""

import sys
from collections.abc import Callable

import torch

from megatron_tpt.config.cli import run
from megatron_tpt.config.load import load_recipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.training.builder import build_trainer
from megatron_tpt.training.callbacks import default_callbacks
from megatron_tpt.training.checkpoint_state import weights_state
from megatron_tpt.training.launch import distributed
from megatron_tpt.training.pretrain_data import build_pretrain_data, prepare_cache
from megatron_tpt.training.trainer import Trainer

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed.param_and_grad_buffer import shard_buffer

Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]


def gather_shards(trainer: Trainer) -> None:
    """Under the distributed optimizer every rank has reduced its own part of the gradients alone."""
    for buffer in (buffer for chunk in trainer.model.chunks for buffer in chunk.buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = shard_buffer(bucket.grad_data, group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)


def pieces_of(gpts: list[torch.nn.Module], value_of: Callable[[torch.nn.Parameter], torch.Tensor]) -> Pieces:
    """(key, global shape, offset, value) of everything that this rank holds."""
    values = {parameter.data_ptr(): value_of(parameter) for gpt in gpts for parameter in gpt.parameters()}
    pieces = []
    for entry in (entry for piece in weights_state(gpts).values() for entry in piece.values()):
        shards = [entry]
        if isinstance(entry, ShardedTensorFactory):
            shards = entry.build_fn(entry.key, values[entry.data.data_ptr()], entry.replica_id, None)
        for shard in shards:
            assert isinstance(shard, ShardedTensor)
            value = shard.data if shard is not entry else values[shard.data.data_ptr()]
            pieces.append((shard.key, shard.global_shape, shard.global_offset, value.reshape(shard.data.shape).clone()))
    return pieces


def main() -> None:
    recipe = prepare(*load_recipe(PretrainRecipe, sys.argv[1:]))
    with distributed(recipe, before=prepare_cache):
        trainer = build_trainer(recipe, build_pretrain_data(recipe), default_callbacks())
        update, rank = trainer.model.optimizer.step, torch.distributed.get_rank()

        def write_gradients_then_update():
            if trainer.global_step == 0:
                if recipe.parallel.distributed_optimizer:
                    gather_shards(trainer)
                gradients = pieces_of(trainer.model.gpts, lambda parameter: parameter.main_grad)
                torch.save(gradients, f"{recipe.run.output_dir}.gradients-{rank}.pt")
            return update()

        trainer.model.optimizer.step = write_gradients_then_update
        trainer.fit()
        weights = pieces_of(trainer.model.gpts, lambda parameter: parameter.detach())
        torch.save(weights, f"{recipe.run.output_dir}.weights-{rank}.pt")


if __name__ == "__main__":
    run(main)
