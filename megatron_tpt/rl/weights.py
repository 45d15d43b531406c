"""The weights of a model that is spread over ranks, whole, under the names of its Hugging Face folder."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_tpt import platform
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.interop.hf_config import adapter_of
from megatron_tpt.training.checkpoint_loading import sharded_tensors
from megatron_tpt.training.checkpoint_state import weights_state

from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.models.gpt.gpt_model import GPTModel


class WholeWeights:
    """The weights as engines get them (DescribedWeights): all ranks iterate them to the end, once."""

    def __init__(self, model: ModelConfig, gpts: Sequence[GPTModel]) -> None:
        self._model, self._dtype = model, next(gpts[0].parameters()).dtype
        self._tensors = whole_weights(model, gpts)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._tensors

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of every tensor, in the order of the iteration; from the table of the model alone."""
        adapter, found = adapter_of(self._model), []
        for row, layer in adapter.places(self._model):
            names = adapter.names(self._model, row, layer)
            found += [(name, self._dtype, shape) for name, shape in zip(names, row.shapes.values(), strict=True)]
        return found


@torch.no_grad()
def whole_weights(model: ModelConfig, gpts: Sequence[GPTModel]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the Hugging Face model, one after another, with its name; on all ranks, which all iterate to the
    end. They are no views of the model's weights.

    Every rank adds the pieces that it is the first to hold to zeros, which is exact in any order.
    """
    pieces: dict[tuple[str, int | None], list[ShardedTensor]] = defaultdict(list)
    for one in sharded_tensors(weights_state(gpts)):
        if is_main_replica(one.replica_id):
            pieces[one.key, int(one.global_offset[0]) if one.prepend_axis_num else None].append(one)
    adapter, dtype = adapter_of(model), next(gpts[0].parameters()).dtype
    for row, layer in adapter.places(model):
        whole = torch.zeros(row.weight.shape, dtype=dtype, device=platform.device())
        for one in pieces[row.weight.key, layer]:
            begins = one.global_offset[one.prepend_axis_num :]
            place = tuple(slice(begin, begin + size) for begin, size in zip(begins, one.data.shape, strict=True))
            whole[place] = one.data
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(whole)
        parts = row.transform.split(whole)
        for name, part in zip(adapter.names(model, row, layer), parts, strict=True):
            yield name, part.contiguous()
