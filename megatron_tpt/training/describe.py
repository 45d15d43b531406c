"""What a recipe amounts to, before anything is started: the report of `--dry-run`."""

import dataclasses

from megatron_tpt.config.load import to_yaml
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.training.memory import estimate_memory, peak_of, tokens_per_s_bound
from megatron_tpt.training.metrics import model_flops_per_token

GIB = 2**30


def describe(recipe: Recipe, world_size: int) -> str:
    """The resolved recipe, the layout over `world_size` processes, sizes and speeds that follow from them, as text."""
    model, parallel, training = recipe.model, recipe.parallel, recipe.training
    t, p, c = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size
    vp = parallel.virtual_pipeline_parallel_size
    dp = parallel.data_parallel_size(world_size)
    stages = estimate_memory(recipe, dp)
    memory = max(stages, key=lambda stage: stage.total)
    tokens_per_step = training.global_batch_size * training.sequence_length
    num_tokens = training.num_samples(training.num_steps) * training.sequence_length
    flops = model_flops_per_token(model, training.sequence_length)
    parts = ", ".join(f"{f.name} {getattr(memory, f.name) / GIB:.2f}" for f in dataclasses.fields(memory))
    peak, peak_name = peak_of(recipe)
    bound = tokens_per_s_bound(recipe, world_size)
    rows = {
        "layout": f"{world_size} processes = tensor {t} x pipeline {p} x {f'context {c} x ' if c > 1 else ''}data {dp}"
        + (", sequence parallel" if parallel.sequence_parallel else "")
        + (f", FSDP ({parallel.fsdp})" if parallel.fsdp != "none" else ""),
        "layers per pipeline stage": ", ".join(map(str, parallel.stage_layers(model.num_layers)))
        + (f", in {vp} pieces each" if vp > 1 else ""),
        "micro-batches per step and rank": f"{training.global_batch_size // (training.micro_batch_size * dp)}",
        "parameters": f"{model.num_parameters():,}",
        "memory per rank (estimate)": f"{memory.total / GIB:.2f} GiB ({parts})",
        "the same by pipeline stage": ", ".join(f"{stage.total / GIB:.2f}" for stage in stages) + " GiB",
        "tokens per step": f"{tokens_per_step:,}",
        "tokens of the run": f"{num_tokens:,}",
        "training FLOPs per token": f"{flops:.4g}",
        "tokens/s at 100% MFU": f"{bound:,.0f} ({peak:,.0f} TFLOP/s each: {peak_name}; "
        f"FLOPs per token: 6 per matrix weight, 6 x layers x sequence x heads x head size for causal attention)",
        "training FLOPs of the run": f"{flops * num_tokens:.4g}",
    }
    width = max(map(len, rows))
    return to_yaml(recipe) + "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
