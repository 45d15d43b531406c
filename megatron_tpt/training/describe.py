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


def _activation_bytes_per_layer(recipe: Recipe) -> float:
    """What one layer keeps of one micro-batch for its backward pass.

    Counted as in Korthikanti et al. (arXiv 2205.05198, section 4), for a Llama block with fused attention: the inputs
    of the two norms and of what follows them (4 s b h values, split only by sequence parallelism); queries, attention
    output, keys, values, the two halves of the feed-forward network and their product, split by tensor parallelism.
    Megatron Core's own attention also keeps its scores before and after the softmax (unless they are recomputed); full
    recomputation keeps a layer's input alone.
    """
    model, parallel, training = recipe.model, recipe.parallel, recipe.training
    t = parallel.tensor_parallel_size
    tokens = training.sequence_length * training.micro_batch_size
    if training.recompute == "full":
        values = tokens * model.hidden_size / (t if parallel.sequence_parallel else 1)
    else:
        values = tokens * 4 * model.hidden_size / (t if parallel.sequence_parallel else 1)
        width = 2 * (model.num_attention_heads + model.query_groups) * model.kv_channels + 3 * model.ffn_hidden_size
        values += tokens * width / t
        if training.recompute == "none" and model.transformer_impl == "local":
            values += 2 * model.num_attention_heads * training.sequence_length * tokens / t
    return values * (4 if training.dtype == "fp32" else 2)


def estimate_memory(recipe: Recipe, data_parallel_size: int) -> Memory:
    """Memory per rank, an estimate: temporary buffers and the allocator's waste are not in it.

    Weights in the training precision, gradients in fp32, AdamW with two fp32 moments and, in bf16, fp32 main weights
    (split over the data-parallel ranks with the distributed optimizer). The first of p pipeline stages holds the
    activations of p micro-batches; without a pipeline there are the logits too, in the training precision and in fp32.
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
    num_microbatches = max(1, training.global_batch_size // (training.micro_batch_size * data_parallel_size))
    activations = _activation_bytes_per_layer(recipe) * model.num_layers / p * min(p, num_microbatches)
    if p == 1:
        tokens = training.sequence_length * training.micro_batch_size
        activations += tokens * model.padded_vocab_size / t * (value_bytes + 4)
    return Memory(parameters * value_bytes, parameters * 4, parameters * state_bytes / shards, activations)


def describe(recipe: Recipe, world_size: int) -> str:
    """The resolved recipe, the layout over `world_size` processes, sizes and speeds that follow from them, as text."""
    model, parallel, training = recipe.model, recipe.parallel, recipe.training
    t, p = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    dp = parallel.data_parallel_size(world_size)
    memory = estimate_memory(recipe, dp)
    tokens_per_step = training.global_batch_size * training.sequence_length
    num_tokens = training.num_samples(training.num_steps) * training.sequence_length
    flops = model_flops_per_token(model, training.sequence_length)
    parts = ", ".join(f"{f.name} {getattr(memory, f.name) / GIB:.2f}" for f in dataclasses.fields(memory))
    rows = {
        "layout": f"{world_size} processes = tensor {t} x pipeline {p} x data {dp}"
        + (", sequence parallel" if parallel.sequence_parallel else ""),
        "micro-batches per step and rank": f"{training.global_batch_size // (training.micro_batch_size * dp)}",
        "parameters": f"{model.num_parameters():,}",
        "memory per rank (estimate)": f"{memory.total / GIB:.2f} GiB ({parts})",
        "tokens per step": f"{tokens_per_step:,}",
        "tokens of the run": f"{num_tokens:,}",
        "training FLOPs per token": f"{flops:.4g}",
        "training FLOPs of the run": f"{flops * num_tokens:.4g}",
    }
    width = max(map(len, rows))
    return to_yaml(recipe) + "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
