"""Initial weights that depend on the seed alone, whatever the parallel layout."""

import math
from collections.abc import Iterator

import torch

from megatron_tpt import platform  # noqa: F401  (adapts Megatron Core)
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.models.precision import unrounded_values
from megatron_tpt.names import seed_of

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt.gpt_model import GPTModel


def _weight_shards(gpt: GPTModel) -> Iterator[ShardedTensor]:
    state = gpt.sharded_state_dict()
    for name, value in unrounded_values(gpt).items():
        state[name].data = value
    apply_factories(state)  # splits the gated projections into their two halves
    for value in nested_values(state):
        if isinstance(value, ShardedTensor) and value.data is not None:
            yield value


@torch.no_grad()
def initialize_weights(gpt: GPTModel, model: ModelConfig, seed: int) -> None:
    """Draw every matrix from a normal distribution that depends on `seed` and the matrix alone.

    Megatron Core draws from one stream per rank, so that the weights depend on the layout. Here each matrix is
    identified by the checkpoint metadata of its shards (key and offset): each rank draws the full matrix from a seed
    derived from `seed` and this name, and keeps its part. Norms stay 1, biases are 0. For projections back into the
    residual stream the standard deviation is divided by sqrt(2 * num_layers), as in GPT-2.
    """
    for parameter_name, parameter in gpt.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.zero_()
    for shard in _weight_shards(gpt):
        num_stacked = shard.prepend_axis_num  # leading axes that only count layers
        whole_shape = shard.global_shape[num_stacked:]
        if len(whole_shape) < 2:
            continue
        into_residual = ".linear_proj." in shard.key or ".linear_fc2." in shard.key
        std = model.init_std / (math.sqrt(2 * model.num_layers) if into_residual else 1.0)
        name = f"{seed}/{shard.key}/{shard.global_offset[:num_stacked]}"
        generator = torch.Generator().manual_seed(seed_of(name))
        whole = torch.empty(whole_shape).normal_(0.0, std, generator=generator)
        place = tuple(
            slice(offset, offset + length)
            for offset, length in zip(
                shard.global_offset[num_stacked:], shard.data.shape[-len(whole_shape) :], strict=True
            )
        )
        shard.data.copy_(whole[place].view(shard.data.shape))
    for name, value in unrounded_values(gpt).items():
        gpt.get_parameter(name).copy_(value)
