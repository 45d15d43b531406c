"""Checkpoints under Megatron FSDP: full tensors assembled from its shards, in the distributed optimizer's format.

So the files are the same with and without FSDP: each can resume from the other's, and both can be exported. When
saving, tensors are assembled one after the other from the shards of all data-parallel ranks, and kept in host memory of
the first of these ranks until they are written. When loading, every rank reads full tensors into host memory (12 bytes
per parameter) and keeps its shards.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megatron_tpt.platform.megatron_core import copy_main_weights_to_model

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import update_uneven_dtensor_chunk_metadata
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import to_local_if_dtensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


def is_sharded(gpt: GPTModel) -> bool:
    """Whether Megatron FSDP holds this model's parameters. Call it after taking a state dict: FSDP hides its shards
    during a forward pass, and exposes them for a state dict."""
    return any(isinstance(parameter, DTensor) for parameter in gpt.parameters())


def _place(parameter: DTensor) -> tuple[slice, ...]:
    """Where this rank's shard lies in the whole parameter. All data-parallel ranks call it."""
    if not hasattr(parameter._local_tensor, "__create_chunk_list__"):
        update_uneven_dtensor_chunk_metadata(parameter)
    (chunk,) = parameter._local_tensor.__create_chunk_list__()
    return tuple(slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))


def _put_together(parameter: DTensor, shard: torch.Tensor) -> torch.Tensor:
    """The full tensor of which every rank has a shard, in CPU memory; on all but the first rank a tensor without
    storage, since only the first rank writes it."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    whole = torch.zeros(parameter.shape, dtype=shard.dtype, device=shard.device)
    whole[_place(parameter)] = shard
    torch.distributed.all_reduce(whole, group=group)
    return whole.cpu() if group.rank() == 0 else torch.zeros((), dtype=shard.dtype).expand(whole.shape)


@torch.no_grad()
def whole_weights(entries: dict[str, Any], gpt: GPTModel) -> dict[str, Any]:
    """The entries of a sharded state dict, by parameter name, with full weights in the precision of training."""
    dtype = gpt.config.params_dtype
    parameters = dict(gpt.named_parameters())
    result = {}
    for name, entry in entries.items():
        whole = _put_together(parameters[name], parameters[name].to_local()).to(dtype)
        of_type = {"dtype": dtype} if isinstance(entry, ShardedTensor) else {}
        result[name] = replace(entry, data=whole, **of_type)
    return result


def _shards(parameter: DTensor, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """This rank's shards of a parameter and of its moments; if the shard is empty, the moments may be missing."""
    state = optimizer.state.get(parameter, {})
    local = parameter.to_local()
    moments = {
        name: to_local_if_dtensor(state[name]) if name in state else torch.zeros_like(local) for name in _MOMENTS
    }
    return {"param": local, **moments}


@torch.no_grad()
def optimizer_state(
    gpt: GPTModel, entries: dict[str, Any], optimizer: DistributedOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    """The optimizer's part of a sharded state dict, laid out as DistributedOptimizer does.

    `entries` describe the weights by parameter name; when loading, they get empty tensors to be filled.
    """
    param_state = {}
    for index, (name, parameter) in enumerate(gpt.named_parameters()):
        param_state[index] = {
            key: make_sharded_optimizer_tensor(
                entries[name],
                torch.empty(parameter.shape, dtype=shard.dtype) if is_loading else _put_together(parameter, shard),
                f"optimizer.state.{key}",
            )
            for key, shard in _shards(parameter, optimizer.optimizer).items()
        }
    # torch's AdamW counts steps per parameter, except for empty shards; other optimizers count them per group.
    step = max([float(state["step"]) for state in optimizer.optimizer.state.values() if "step" in state], default=0.0)
    groups = [{"step": step, **group} for group in optimizer.param_groups]
    return {
        "optimizer": {"param_groups": [{k: v for k, v in group.items() if k != "params"} for group in groups]},
        "param_state": param_state,
        "param_state_sharding_type": "fully_reshardable",
    }


@torch.no_grad()
def set_optimizer_state(gpt: GPTModel, optimizer: DistributedOptimizer, loaded: dict[str, Any]) -> None:
    """Copy this rank's shards from the tensors loaded into `optimizer_state`, including the weights."""
    step = loaded["optimizer"]["param_groups"][0]["step"]
    inner = optimizer.optimizer
    for whole, parameter in zip(loaded["param_state"].values(), gpt.parameters(), strict=True):
        place = _place(parameter)
        parameter.to_local().copy_(whole["param"][place])
        moments = {name: torch.zeros_like(parameter) for name in _MOMENTS}
        for name, moment in moments.items():
            moment.to_local().copy_(whole[name][place])
        inner.state[parameter] = moments
        if isinstance(inner, torch.optim.AdamW):
            inner.state[parameter]["step"] = torch.tensor(float(step))
    if not isinstance(inner, torch.optim.AdamW):
        for group in inner.param_groups:
            group["step"] = int(step)
    copy_main_weights_to_model(optimizer)
    for chunk in optimizer.model_chunks:
        chunk.start_param_sync()
