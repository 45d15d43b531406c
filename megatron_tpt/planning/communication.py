"""What a rank of a layout sends in one step, by kind: bytes, collectives, the link, and the time that it takes.

Bytes are what a rank sends in a ring: (n - 1) / n of the whole for an all-gather or a reduce-scatter among n ranks.
docs/planning.md has the formulas; those of tensor and sequence parallelism are of Korthikanti et al., arXiv 2205.05198,
section 4.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tpt.config.recipe import Recipe
from megatron_tpt.models.sizes import stage_parameters
from megatron_tpt.planning.machine import Machine
from megatron_tpt.training.memory import micro_batch_tokens, num_microbatches

_VALUE_BYTES = 2
# Parameters of which Megatron Core reduces the gradients, and gathers the values, at once: the larger of these, the
# second times the ranks (its DistributedDataParallel).
_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in a step for one purpose."""

    kind: str
    """tensor, context, pipeline, or data."""
    num_ranks: int
    """Of the group."""
    num_bytes: float
    """Sent by a rank, of the pipeline stage that sends most."""
    num_messages: float
    """Collectives, or messages to one rank, that it is sent in."""
    link: str
    """The link that limits it: NVLink, or the network."""
    seconds: float
    """By the bandwidth and the latency of the link, whether or not computation hides it."""


def passes_per_layer(recipe: Recipe) -> float:
    """How often a layer is passed: 1, but in models that pass some several times."""
    return recipe.model.passes()["layer"] / recipe.model.num_layers


def _split(recipe: Recipe) -> int:
    """Among how many ranks the residual stream is split, beside the context."""
    parallel = recipe.parallel
    return parallel.tensor_parallel_size if parallel.sequence_parallel else 1


def tensor_bytes(recipe: Recipe) -> tuple[float, float]:
    """Of one layer and micro-batch, forward and backward: of all collectives, and of those beside which Megatron Core
    computes nothing without tp_comm_overlap.

    Sequence parallelism gathers the inputs of the layer's two halves and reduce-scatters their outputs; in the backward
    pass it gathers the outputs' gradients, and, beside a matrix product, gathers the inputs again and reduce-scatters
    their gradients. Transformer Engine gathers what a product in FP8 takes in FP8. Without sequence parallelism every
    half has an all-reduce forward and, beside a product, one backward, each a reduce-scatter and an all-gather.
    """
    t, stream = recipe.parallel.tensor_parallel_size, micro_batch_tokens(recipe) * recipe.model.hidden_size
    one = (t - 1) / t * stream
    if not recipe.parallel.sequence_parallel:
        return 8 * one * _VALUE_BYTES, 4 * one * _VALUE_BYTES
    gather = one * (1 if recipe.training.matmul_precision == "fp8" else _VALUE_BYTES)
    reduce = one * _VALUE_BYTES
    return 6 * gather + 4 * reduce, 4 * gather + 2 * reduce


def context_bytes(recipe: Recipe) -> float:
    """Of one layer and micro-batch, forward and backward.

    Ring and all-gather: keys and values reach the c - 1 others; backward again, and their gradients return. All-to-all:
    (c - 1) / c of queries, keys, values and outputs change places, and of their gradients.
    """
    model, parallel = recipe.model, recipe.parallel
    c, tokens = parallel.context_parallel_size, micro_batch_tokens(recipe) / parallel.tensor_parallel_size
    keys_and_values = 2 * model.query_groups * model.kv_channels
    if parallel.context_parallel_exchange == "a2a":
        queries_and_outputs = 2 * model.num_attention_heads * model.kv_channels
        return 2 * (c - 1) / c * tokens * (keys_and_values + queries_and_outputs) * _VALUE_BYTES
    return 3 * (c - 1) * tokens * keys_and_values * _VALUE_BYTES


def layer_messages(recipe: Recipe) -> tuple[int, int]:
    """Of one layer and micro-batch, forward and backward: collectives of tensor parallelism, and messages or
    collectives of context parallelism. An all-reduce counts as the two that it consists of; Transformer Engine gathers
    keys and values apart, and exchanges queries and outputs as well where it trades sequence for heads."""
    parallel = recipe.parallel
    by_context = {"p2p": 3 * (parallel.context_parallel_size - 1), "all_gather": 6, "a2a": 8}
    return 10 if parallel.sequence_parallel else 8, by_context[parallel.context_parallel_exchange]


def pipeline_messages(recipe: Recipe) -> int:
    """Of one micro-batch: a stage sends activations to the next one and gradients to the one before, once for each of
    its pieces. The first and the last stage of a pipeline without pieces send half."""
    parallel = recipe.parallel
    p, v = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    directions = 0 if p == 1 else 1 if p == 2 and v == 1 else 2
    return directions * v


def pipeline_bytes(recipe: Recipe) -> float:
    """Of one micro-batch, in pipeline_messages."""
    stream = micro_batch_tokens(recipe) * recipe.model.hidden_size / _split(recipe)
    return pipeline_messages(recipe) * stream * _VALUE_BYTES


def _data_exchanges(recipe: Recipe, num_gpus: int) -> tuple[int, int]:
    """How often all gradients of a rank are reduced in a step, and all parameters gathered."""
    parallel = recipe.parallel
    m = num_microbatches(recipe, parallel.data_parallel_size(num_gpus))
    reductions = m if parallel.fsdp in ("optim_grads", "optim_grads_params") else 1
    return reductions, 2 * m if parallel.fsdp == "optim_grads_params" else 1


def most_parameters(recipe: Recipe) -> int:
    """Those of a rank of the stage that has most."""
    parallel = recipe.parallel
    return max(stage_parameters(recipe.model, parallel, stage) for stage in range(parallel.pipeline_parallel_size))


def data_ranks(recipe: Recipe, num_gpus: int) -> int:
    """Data- and context-parallel ranks, which hold the same parameters."""
    return num_gpus // (recipe.parallel.tensor_parallel_size * recipe.parallel.pipeline_parallel_size)


def data_messages(recipe: Recipe, num_gpus: int) -> int:
    """Of one step: every exchange is done bucket by bucket where it overlaps with computation, with FSDP layer by
    layer (and one for the embedding and the output matrix)."""
    parallel = recipe.parallel
    bucket = max(_BUCKET, _BUCKET_PER_RANK * data_ranks(recipe, num_gpus))
    pieces = math.ceil(most_parameters(recipe) / bucket) if parallel.overlap_grad_reduce else 1
    if parallel.fsdp != "none":
        pieces = recipe.model.num_layers + 1
    return sum(_data_exchanges(recipe, num_gpus)) * pieces


def data_bytes(recipe: Recipe, num_gpus: int, gradient_bytes: int) -> tuple[float, float]:
    """Of one step, on the stage with most parameters: those of gradients, and those of parameters.

    One reduce-scatter and one all-gather with the distributed optimizer, an all-reduce without it. FSDP reduces the
    gradients it shards in every micro-batch; parameters that it shards are gathered twice in each.
    """
    ranks = data_ranks(recipe, num_gpus)
    sent = (ranks - 1) / ranks * most_parameters(recipe)
    reductions, gathers = _data_exchanges(recipe, num_gpus)
    parameter_bytes = _VALUE_BYTES if recipe.parallel.distributed_optimizer else gradient_bytes
    return reductions * sent * gradient_bytes, gathers * sent * parameter_bytes


def traffic(recipe: Recipe, num_gpus: int, machine: Machine, gradient_bytes: int) -> dict[str, Traffic]:
    """All that a rank sends in a step, by kind; kinds without ranks to send to are omitted."""
    parallel = recipe.parallel
    t, c, p = parallel.tensor_parallel_size, parallel.context_parallel_size, parallel.pipeline_parallel_size
    d = parallel.data_parallel_size(num_gpus)
    m = num_microbatches(recipe, d)
    layers = max(parallel.stage_layers(recipe.model.num_layers)) * passes_per_layer(recipe)
    # From the nearest to the farthest neighbour. Gradients are reduced over context and data ranks together.
    before_data, before_pipeline = (1, d) if parallel.rank_order == "tp-cp-dp-pp" else (p, 1)
    stride_d, stride_p = t * c * before_data, t * c * before_pipeline
    by_tensor, by_context = layer_messages(recipe)
    groups: dict[str, tuple[Sequence[int], float, float]] = {
        "tensor": (range(t), m * layers * tensor_bytes(recipe)[0], m * layers * by_tensor),
        "context": (range(0, t * c, t), m * layers * context_bytes(recipe), m * layers * by_context),
        "pipeline": (
            range(0, stride_p * p, stride_p),
            m * pipeline_bytes(recipe),
            m * pipeline_messages(recipe),
        ),
        "data": (
            [i * t + j * stride_d for j in range(d) for i in range(c)],
            sum(data_bytes(recipe, num_gpus, gradient_bytes)),
            data_messages(recipe, num_gpus),
        ),
    }
    result = {}
    for kind, (ranks, num_bytes, num_messages) in groups.items():
        if len(ranks) > 1:
            # Context parallelism's own ring, and its trade of sequence for heads, are not NCCL's rings.
            is_ring = kind != "pipeline" and (kind != "context" or parallel.context_parallel_exchange == "all_gather")
            link = machine.link(ranks, is_ring=is_ring)
            seconds = link.seconds(num_bytes, num_messages)
            result[kind] = Traffic(kind, len(ranks), num_bytes, num_messages, link.name, seconds)
    return result
