"""One forward and backward pass through Megatron Core's pipeline schedules, and the sums of its objective."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from megatron_tpt import platform
from megatron_tpt.objectives.objective import MicroBatch, Needs, Objective
from megatron_tpt.training.batches import DRAWN, Batch
from megatron_tpt.training.branches import outside_branch, positions
from megatron_tpt.training.phases import phase

from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

Report = tuple[torch.Tensor, torch.Tensor, Any]
"""For a micro-batch: the loss to differentiate, summed over tokens; their number, int []; and the value to return."""


def _attention_mask(batch: MicroBatch) -> torch.Tensor:
    """Attention mask [b, 1, s, s], True where attention is masked: at other examples and later tokens."""
    segment_ids = batch["segment_ids"]
    length = segment_ids.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).triu(1)
    masked = (segment_ids[:, :, None] != segment_ids[:, None, :]) | later
    if "branch_ids" in batch:
        masked |= outside_branch(batch)
    return masked[:, None]


def _packed_sequences(segment_ids: torch.Tensor) -> PackedSeqParams:
    """Where each example of a flattened batch [b, s] begins, in the form that Transformer Engine's attention takes.

    Takes the batch in host memory: on a GPU, counting would wait for all queued work.
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


def part_of_sequence(batch: MicroBatch, rank: int, size: int) -> MicroBatch:
    """The share of a batch's tensors [b, s] that one of `size` context-parallel ranks computes: [b, s / size].

    The sequence is split into 2 * size parts, of which rank r takes r and 2 * size - 1 - r, to balance the load under a
    causal mask. Transformer Engine's attention expects this order.
    """
    if size == 1:
        return batch
    parts = {name: value.chunk(2 * size, dim=1) for name, value in batch.items() if value.dim() == 2}
    return batch | {name: torch.cat([cut[rank], cut[2 * size - 1 - rank]], dim=1) for name, cut in parts.items()}


def forward_step(
    microbatches: Iterator[MicroBatch],
    model: torch.nn.Module,
    *,
    needs: Needs,
    evaluate: Callable[[MicroBatch, torch.Tensor], Report],
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Report]]:
    """Run one micro-batch through this rank's part of the model; Megatron Core's schedules call this.

    Batches with `segment_ids` have several examples per row. Attention is then restricted to each example, by
    Transformer Engine's packed attention or by a mask.
    """
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    on_host = part_of_sequence(next(microbatches), rank, size)
    batch = {name: value.to(platform.device(), non_blocking=True) for name, value in on_host.items()}
    tokens, labels, position_ids = batch["tokens"], batch["labels"], batch["position_ids"]
    attention: dict[str, Any] = {"attention_mask": None}
    if _attention_is_packed(model, batch):
        attention["packed_seq_params"] = _packed_sequences(on_host["segment_ids"])
        tokens, labels, position_ids = (tensor.reshape(1, -1) for tensor in (tokens, labels, position_ids))
    elif "segment_ids" in batch:
        attention["attention_mask"] = _attention_mask(batch)
    draws = {name.removeprefix(DRAWN): int(value) for name, value in on_host.items() if name.startswith(DRAWN)}
    if draws:  # what the decoder measures becomes part of the micro-batch, for the objective
        attention["extra_block_kwargs"] = {"draws": draws, "measured": batch}
    with positions(model, position_ids) if "branch_ids" in batch else contextlib.nullcontext():
        outputs = model(tokens, position_ids, labels=labels if needs == "token_losses" else None, **attention)
    return outputs, partial(evaluate, batch)


def _attention_is_packed(model: torch.nn.Module, batch: MicroBatch) -> bool:
    """Whether examples that share a row are separated by Transformer Engine's packed attention, not by a mask."""
    is_packed = "segment_ids" in batch and not attention_takes_mask(model)
    assert not (is_packed and "branch_ids" in batch), "packed attention has no branches"
    return is_packed


def attention_takes_mask(model: torch.nn.Module) -> bool:
    """Whether examples that share a row are separated by a mask, so that rows can have branches (branches.py)."""
    return bool(get_model_config(model).transformer_impl != "transformer_engine")


@phase("forward and backward")
def run_microbatches(
    chunks: Sequence[torch.nn.Module],
    batch: Batch,
    needs: Needs,
    evaluate: Callable[[MicroBatch, torch.Tensor], Report],
    *,
    forward_only: bool = False,
) -> list[Any]:
    """Forward (and backward) over the micro-batches of one step, through this rank's chunks of a model.

    `evaluate(microbatch, outputs)` is called on the last pipeline stage. Returns the value of its report on each
    micro-batch, in order; an empty list on other stages. Megatron Core divides the gradients by the number of tokens in
    the global batch, so that every token has the same weight, whatever its micro-batch and rank.
    """
    first = next(iter(batch))
    (samples, length), packed = first["tokens"].shape, _attention_is_packed(chunks[0], first)
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=partial(forward_step, needs=needs, evaluate=evaluate),
        data_iterator=[iter(batch) for _ in chunks],  # every chunk processes all micro-batches
        model=list(chunks),
        num_microbatches=len(batch),
        seq_length=length * samples if packed else length,
        micro_batch_size=1 if packed else samples,
        forward_only=forward_only,
    )
    return results


def compute_sums(
    chunks: Sequence[torch.nn.Module], batch: Batch, objective: Objective, *, forward_only: bool = False
) -> torch.Tensor:
    """This rank's sums of an objective over a batch, fp64 [num_sums]; zeros on all but the last pipeline stage. Unless
    `forward_only`, accumulates the gradients of the loss in the buffers of the chunks."""
    results = run_microbatches(
        chunks, batch, objective.needs, partial(evaluate_objective, objective), forward_only=forward_only
    )
    if not results:
        return torch.zeros(len(objective.sum_names), dtype=torch.float64, device=platform.device())
    return torch.stack(results).sum(dim=0)


def evaluate_objective(objective: Objective, batch: MicroBatch, outputs: torch.Tensor) -> Report:
    """Call the objective; the value of the report is its sums in the order of `sum_names`, fp64 [num_sums]."""
    loss, sums = objective(outputs, batch)
    return loss, sums["tokens"].to(torch.int), torch.stack([sums[name] for name in objective.sum_names]).double()


def reduce_sums(sums: torch.Tensor) -> torch.Tensor:
    """Each rank's sums -> the sums over the whole batch, the same on every rank. Any shape."""
    sums = sums.double()
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return broadcast_from_last_stage(sums)


def broadcast_from_last_stage(value: torch.Tensor) -> torch.Tensor:
    """The last pipeline stage's `value`, on all stages; modifies `value` in place."""
    torch.distributed.broadcast(
        value,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return value
