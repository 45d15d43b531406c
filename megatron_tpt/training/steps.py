"""One forward and backward pass through Megatron Core's pipeline schedules, with losses kept apart by kind of token."""

import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from megatron_tpt import platform

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

Batch = dict[str, torch.Tensor]


class TimedIterator:
    """An iterator that adds up the time its consumer waits for it: `waited_s`."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.waited_s = 0.0

    def __iter__(self) -> "TimedIterator":
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.waited_s += time.perf_counter() - begin


def _segment_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Attention mask [b, 1, s, s], True where a token must not look: another example, or a later token."""
    length = segment_ids.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).triu(1)
    return ((segment_ids[:, :, None] != segment_ids[:, None, :]) | later)[:, None]


def _packed_sequences(segment_ids: torch.Tensor) -> PackedSeqParams:
    """Where each example of a batch [b, s], laid end to end, begins: what Transformer Engine's attention takes.

    The batch is still in host memory: on a GPU, counting would wait for all that is queued there.
    """
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = torch.nonzero(starts.flatten()).flatten()
    ends = torch.tensor([segment_ids.numel()], device=begins.device)
    borders = torch.cat([begins, ends]).to(torch.int32)
    longest = int((borders[1:] - borders[:-1]).max())
    cu_seqlens = borders.to(platform.device())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _sums_by_source(batch: Batch, weighted: torch.Tensor, num_sources: int) -> torch.Tensor:
    """Masked token losses [b, s] -> document loss, document tokens, thinking loss, thinking tokens of every source:
    [num_sources, 4]. `source` in the batch, [b], says which source a row is from; the first when it is not there."""
    mask, thinking = batch["loss_mask"], batch["is_thinking"].to(weighted.dtype)
    thinking_loss, thinking_tokens = (weighted * thinking).sum(dim=1), (mask * thinking).sum(dim=1)
    document_loss, document_tokens = weighted.sum(dim=1) - thinking_loss, mask.sum(dim=1) - thinking_tokens
    rows = torch.stack([document_loss, document_tokens, thinking_loss, thinking_tokens], dim=1).double()
    if "source" not in batch:
        return torch.nn.functional.pad(rows.sum(dim=0, keepdim=True), (0, 0, 0, num_sources - 1))
    return torch.nn.functional.one_hot(batch["source"], num_sources).double().T @ rows


def _loss_function(
    batch: Batch, num_sources: int, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Token losses [b, s] -> their sum, the number of tokens it is over, and sums by source and kind of token:
    [num_sources, 4].

    Megatron Core divides the gradients by the tokens of the whole global batch, so that every token weighs the same
    whatever micro-batch or rank it is in.
    """
    mask = batch["loss_mask"]
    weighted = losses.float().view_as(mask) * mask
    sums = _sums_by_source(batch, weighted.detach(), num_sources)
    return weighted.sum(), mask.sum().to(torch.int), {"sums": sums}


def part_of_sequence(batch: Batch, rank: int, size: int) -> Batch:
    """The share of a batch's tensors [b, s] that one of `size` context-parallel ranks computes: [b, s / size].

    The sequence is cut into 2 * size parts, of which rank r takes r and 2 * size - 1 - r: under a causal mask all then
    have as much to do. It is the order that Transformer Engine's attention takes for granted.
    """
    if size == 1:
        return batch
    parts = {name: value.chunk(2 * size, dim=1) for name, value in batch.items() if value.dim() == 2}
    return batch | {name: torch.cat([cut[rank], cut[2 * size - 1 - rank]], dim=1) for name, cut in parts.items()}


def forward_step(
    batches: Iterator[Batch], model: GPTModel, *, packed_attention: bool, num_sources: int = 1
) -> tuple[torch.Tensor, Any]:
    """Run one micro-batch through this rank's part of the model, as Megatron Core's schedules ask for it.

    Batches with `segment_ids` hold several examples a row; each then attends to itself alone: through Transformer
    Engine's packed attention (`packed_attention`), or through a mask.
    """
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    on_host = part_of_sequence(next(batches), rank, size)
    batch = {name: value.to(platform.device(), non_blocking=True) for name, value in on_host.items()}
    tokens, labels, position_ids = batch["tokens"], batch["labels"], batch["position_ids"]
    attention: dict[str, Any] = {"attention_mask": None}
    if "segment_ids" in batch and packed_attention:
        attention["packed_seq_params"] = _packed_sequences(on_host["segment_ids"])
        tokens, labels, position_ids = (tensor.reshape(1, -1) for tensor in (tokens, labels, position_ids))
    elif "segment_ids" in batch:
        attention["attention_mask"] = _segment_mask(batch["segment_ids"])
    return model(tokens, position_ids, labels=labels, **attention), partial(_loss_function, batch, num_sources)


def run_microbatches(
    chunks: Sequence[torch.nn.Module],
    batches: Iterator[Batch],
    *,
    num_microbatches: int,
    micro_batch_size: int,
    sequence_length: int,
    packed_attention: bool,
    num_sources: int = 1,
    forward_only: bool = False,
) -> torch.Tensor:
    """Forward (and backward) over the micro-batches of one step, through this rank's pieces of the model.

    Returns this rank's loss sums [num_sources, 4]; zeros on all but the last pipeline stage, which alone sees losses.
    """
    results = get_forward_backward_func()(
        forward_step_func=partial(forward_step, packed_attention=packed_attention, num_sources=num_sources),
        # Every piece of the model goes through all micro-batches. The number is given, so that none reads further.
        data_iterator=list(itertools.tee(itertools.islice(batches, num_microbatches), len(chunks))),
        model=list(chunks),
        num_microbatches=num_microbatches,
        seq_length=sequence_length * micro_batch_size if packed_attention else sequence_length,
        micro_batch_size=1 if packed_attention else micro_batch_size,
        forward_only=forward_only,
    )
    if not parallel_state.is_pipeline_last_stage():
        return torch.zeros(num_sources, 4, dtype=torch.float64, device=platform.device())
    return torch.stack([result["sums"] for result in results]).sum(dim=0)


def reduce_sums(sums: torch.Tensor) -> torch.Tensor:
    """Loss sums of every rank -> those of the whole batch, the same on every rank. Any shape."""
    sums = sums.double()
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.broadcast(
        sums,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return sums


def attention_is_packed(model: torch.nn.Module, has_segments: bool) -> bool:
    """Whether examples that share a row are told apart by Transformer Engine's packed attention."""
    return has_segments and get_model_config(model).transformer_impl == "transformer_engine"
