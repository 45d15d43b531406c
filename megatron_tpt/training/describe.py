"""What a recipe amounts to, before anything is started: the report of `--dry-run`."""

import dataclasses

from megatron_tpt.config.load import to_yaml
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.training.metrics import model_flops_per_token

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
    """Estimated bytes on the rank that needs most (the first pipeline stage, which holds most activations)."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(recipe: Recipe, data_parallel_size: int) -> Memory:
    """Memory per rank, an estimate: temporary buffers and the allocator's waste are not in it.

    Weights in the training precision, gradients in fp32, AdamW with two fp32 moments and, in bf16, fp32 main weights
    (split over the data-parallel ranks with the distributed optimizer). Activations of one micro-batch and layer follow
    Korthikanti et al. (arXiv 2205.05198), equations 1-4, with 16 * s * b * f / h more for SwiGLU's second half left in
    its 34: s * b * h * (10 + 24 / t) bytes at two bytes a value, (34 / t) with sequence parallelism, 2 with full
    recomputation, plus attention scores 5 * a * s^2 * b / t where the kernel keeps them (no selective recomputation, no
    fused attention). A first stage of p holds min(p, number of micro-batches) micro-batches.
    """
    model, parallel, training = recipe.model, recipe.parallel, recipe.training
    t, p = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    embedding = model.padded_vocab_size * model.hidden_size
    num_tables = 1 if model.tie_embeddings else 2
    blocks = model.num_parameters() - num_tables * embedding
    parameters = (blocks / p + embedding * (num_tables if p == 1 else 1)) / t
    value_bytes = 4 if training.dtype == "fp32" else 2
    state_bytes = 8 + (4 if training.dtype == "bf16" else 0)
    shards = data_parallel_size if parallel.distributed_optimizer else 1

    s, b, h = training.sequence_length, training.micro_batch_size, model.hidden_size
    per_layer = s * b * h * {True: 34 / t, False: 10 + 24 / t}[parallel.sequence_parallel]
    if training.recompute == "none" and model.transformer_impl == "local":
        per_layer += 5 * model.num_attention_heads * s * s * b / t
    if training.recompute == "full":
        per_layer = 2 * s * b * h
    num_microbatches = max(1, training.global_batch_size // (b * data_parallel_size))
    logits = s * b * model.padded_vocab_size / t * 6 if p == 1 else 0
    activations = per_layer * value_bytes / 2 * model.num_layers / p * min(p, num_microbatches) + logits
    return Memory(parameters * value_bytes, parameters * 4, parameters * state_bytes / shards, activations)


def describe(recipe: Recipe, world_size: int) -> str:
    """The resolved recipe, the layout over `world_size` processes, sizes and speeds that follow from them, as text."""
    model, parallel, training = recipe.model, recipe.parallel, recipe.training
    t, p = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    dp = world_size // (t * p)
    memory = estimate_memory(recipe, dp)
    tokens_per_step = training.global_batch_size * training.sequence_length
    flops = model_flops_per_token(model, training.sequence_length)
    parts = ", ".join(f"{f.name} {getattr(memory, f.name) / GIB:.2f}" for f in dataclasses.fields(memory))
    rows = {
        "layout": f"{world_size} processes = tensor {t} x pipeline {p} x data {dp}"
        + (", sequence parallel" if parallel.sequence_parallel else ""),
        "micro-batches per step and rank": f"{training.global_batch_size // (training.micro_batch_size * dp)}",
        "parameters": f"{model.num_parameters():,}",
        "memory per rank (estimate)": f"{memory.total / GIB:.2f} GiB ({parts})",
        "tokens per step": f"{tokens_per_step:,}",
        "tokens of the run": f"{tokens_per_step * training.num_steps:,}",
        "training FLOPs per token": f"{flops:.4g}",
        "training FLOPs of the run": f"{flops * tokens_per_step * training.num_steps:.4g}",
    }
    width = max(map(len, rows))
    return to_yaml(recipe) + "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
