"""Desynchronization: copies of weights that should be equal but are not, a fault of a machine or of communication that
no loss shows.

Data-parallel ranks hold copies of the same weights, and tensor-parallel ranks hold copies of those that are not split
(norms). Checksums of the bits are compared before an update, when all weights have been gathered. Megatron FSDP keeps a
single copy, and gathers the weights from it in every step.
"""

import collections
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from megatron_tpt import platform
from megatron_tpt.errors import Fault
from megatron_tpt.majority import outliers
from megatron_tpt.names import counted, first_few
from megatron_tpt.training.trainer import Callback, Trainer

from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor

_NUM_NAMED = 3
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # by bytes


def _bits(value: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as integers, as wide as its size allows: 64-bit integers are summed without a cast."""
    flat = value.detach().reshape(-1)
    if flat.storage_offset() * flat.element_size() % max(_INTEGERS):  # torch requires views to be aligned
        flat = flat.clone()
    size = flat.numel() * flat.element_size()
    return flat.view(next(dtype for width, dtype in _INTEGERS.items() if size % width == 0))


def _stored(value: torch.Tensor) -> torch.Tensor:
    """The tensor with the stored bits of a weight: itself, or the bytes of an FP8 weight (training.fp8_param_gather),
    which ranks gather (Transformer Engine's tensor/utils.py, replace_raw_data). An FP8 weight itself reads as
    dequantized values."""
    if not is_float8tensor(value):
        return value
    raw = value._rowwise_data if hasattr(value, "_rowwise_data") else value._data
    assert isinstance(raw, torch.Tensor)
    return raw


def checksums(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of each tensor with its bits read as integers: int64 [n]. A flipped bit changes it."""
    return torch.stack([_bits(_stored(value)).sum() for value in parameters])


def find_unequal_copies(
    names: Sequence[str], ranks: Sequence[int], sums: Sequence[Sequence[int]]
) -> dict[int, list[str]]:
    """The parameters of each rank that differ from the majority of ranks; those of all ranks if there is no majority.

    `sums` are the checksums of every rank, [num_ranks][num_parameters].
    """
    unequal: dict[int, list[str]] = collections.defaultdict(list)
    for name, values in zip(names, zip(*sums, strict=True), strict=True):
        for rank in outliers(dict(zip(ranks, values, strict=True))):
            unequal[rank].append(name)
    return dict(unequal)


def describe(unequal: dict[int, list[str]]) -> str:
    """The result of find_unequal_copies, in one line."""
    names = list(dict.fromkeys(name for own in unequal.values() for name in own))
    ranks = ", ".join(map(str, sorted(unequal)))
    return f"rank {ranks}, {counted(len(names), 'parameter')} ({first_few(names, _NUM_NAMED)})"


class CheckCopies(Callback):
    """Every faults.desync_interval steps: ends the run if copies of the weights differ, and names the ranks."""

    def before_update(self, trainer: Trainer, sums: torch.Tensor) -> bool:
        interval = trainer.recipe.faults.desync_interval
        if interval and trainer.global_step % interval == 0 and trainer.recipe.parallel.fsdp == "none":
            self._compare(trainer)
        return True

    def _compare(self, trainer: Trainer) -> None:
        named = dict(item for gpt in trainer.model.gpts for item in gpt.named_parameters())
        whole = {name: value for name, value in named.items() if not getattr(value, "tensor_model_parallel", False)}
        compared = [
            (list(named), *_gather(named, parallel_state.get_data_parallel_group(with_context_parallel=True))),
            (list(whole), *_gather(whole, parallel_state.get_tensor_model_parallel_group())),
        ]
        differ = torch.stack([(sums != sums[0]).any() for _, _, sums in compared]).any().int()
        torch.distributed.all_reduce(differ, torch.distributed.ReduceOp.MAX)
        if not differ.item():
            return
        own = [find_unequal_copies(names, ranks, sums.tolist()) for names, ranks, sums in compared]
        every = platform.gather_objects(own)
        unequal: dict[int, list[str]] = collections.defaultdict(list)
        for found in itertools.chain.from_iterable(every):
            for rank, names in found.items():
                unequal[rank] += names
        raise Fault(
            f"the weights after step {trainer.global_step} are not the same on all ranks that hold a copy: "
            f"{describe(unequal)}. The same command resumes from the last checkpoint; exclude the machine if it "
            f"happens again"
        )


def _gather(named: dict[str, torch.Tensor], group: Any) -> tuple[list[int], torch.Tensor]:
    """The ranks of a group, and their checksums [num_ranks, num_parameters]."""
    ranks = torch.distributed.get_process_group_ranks(group)
    own = checksums(list(named.values())) if named else torch.zeros(0, dtype=torch.int64, device=platform.device())
    sums = own.new_empty(len(ranks), len(named))
    torch.distributed.all_gather(list(sums.unbind()), own, group=group)
    return ranks, sums
