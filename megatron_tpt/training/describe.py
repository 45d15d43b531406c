"""The report of `--dry-run`: what a recipe would do, computed before anything is started."""

import dataclasses

from megatron_tpt.config.load import to_yaml
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.files import free_space
from megatron_tpt.models.sizes import model_flops_per_token
from megatron_tpt.training.devices import Device
from megatron_tpt.training.memory import (
    COMFORTABLE_SHARE,
    checkpoint_bytes,
    estimate_memory,
    host_bytes_to_save,
    num_checkpoints,
    num_microbatches,
    peak_of,
    tokens_per_s_bound,
)
from megatron_tpt.units import GIB, MIB, duration

ASSUMED_MFU = 0.4
"""The default of --mfu in a dry run: about what well-tuned runs of dense models report on H100s."""


def describe(recipe: Recipe, world_size: int, device: Device, mfu: float | None = None) -> str:
    """The resolved recipe, the layout over `world_size` processes, and the resulting sizes and speeds, as text."""
    rows = _layout_rows(recipe, world_size) | _memory_rows(recipe, world_size, device)
    rows |= _work_rows(recipe, world_size, device, mfu) | _saving_rows(recipe, world_size)
    width = max(map(len, rows))
    return to_yaml(recipe) + "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _layout_rows(recipe: Recipe, world_size: int) -> dict[str, str]:
    model, parallel = recipe.model, recipe.parallel
    t, p, c = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size
    vp, dp = parallel.virtual_pipeline_parallel_size, parallel.data_parallel_size(world_size)
    return {
        "layout": f"{world_size} processes = tensor {t} x pipeline {p} x {f'context {c} x ' if c > 1 else ''}data {dp}"
        + (", sequence parallel" if parallel.sequence_parallel else "")
        + (f", FSDP ({parallel.fsdp})" if parallel.fsdp != "none" else ""),
        "layers per pipeline stage": ", ".join(map(str, parallel.stage_layers(model.num_layers)))
        + (f", in {vp} pieces each" if vp > 1 else ""),
        "micro-batches per step and rank": f"{num_microbatches(recipe, dp)}",
        "parameters": f"{model.num_parameters():,}",
    }


def _memory_rows(recipe: Recipe, world_size: int, device: Device) -> dict[str, str]:
    if not device.is_gpu:  # without Transformer Engine, attention keeps its scores
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, transformer_impl="local"))
    stages = estimate_memory(recipe, recipe.parallel.data_parallel_size(world_size))
    largest = max(stages, key=lambda stage: stage.total)
    parts = ", ".join(f"{f.name} {getattr(largest, f.name) / GIB:.2f}" for f in dataclasses.fields(largest))
    # Processes on a CPU share its memory; every pipeline stage has the same number of them.
    needed, memory_bytes = largest.total, device.memory_bytes * recipe.gpu_share
    if not device.is_gpu:
        needed = world_size * sum(stage.total for stage in stages) / len(stages)
        memory_bytes = device.memory_bytes
    share = needed / memory_bytes
    verdict = (
        "fits" if share <= COMFORTABLE_SHARE else "is tight: buffers come on top" if share <= 1 else "DOES NOT FIT"
    )
    return {
        "memory per rank (estimate)": f"{largest.total / GIB:.2f} GiB ({parts})",
        "the same by pipeline stage": ", ".join(f"{stage.total / GIB:.2f}" for stage in stages) + " GiB",
        "device": f"{device.name}: {needed / GIB:.2f} of {memory_bytes / GIB:.1f} GiB, {verdict}",
    }


def _work_rows(recipe: Recipe, world_size: int, device: Device, mfu: float | None) -> dict[str, str]:
    training = recipe.training
    num_tokens = training.num_samples(training.num_steps) * training.sequence_length
    passes = recipe.model.expected_passes(training.num_steps)
    flops = model_flops_per_token(recipe.model, training.sequence_length, passes)
    rows = {
        "tokens per step": f"{training.global_batch_size * training.sequence_length:,}",
        "tokens of the run": f"{num_tokens:,}",
        "training FLOPs per token": f"{flops:.4g} (6 per matrix weight, 6 x layers x sequence x heads x head size for "
        f"causal attention)",
        "training FLOPs of the run": f"{flops * num_tokens:.4g}",
    }
    if (known := peak_of(recipe, device)) is None:
        which = "--device=h100 describes the run on that GPU" if not device.is_gpu else "give logging.peak_tflops"
        return rows | {"time": f"not estimated: no peak is known of {device.name}; {which}"}
    peak, peak_name = known
    bound, assumed = tokens_per_s_bound(recipe, world_size, peak), mfu or ASSUMED_MFU
    hours = num_tokens / (bound * assumed) / 3600
    unit = "GPU-hours" if device.is_gpu else "device-hours"
    return rows | {
        "tokens/s at 100% MFU": f"{bound:,.0f} ({peak:,.0f} TFLOP/s each: {peak_name})",
        f"time at {assumed:.0%} MFU": f"{duration(3600 * hours)}, {hours * world_size:,.1f} {unit}, "
        f"{recipe.uncounted} apart ({'--mfu' if mfu else 'an assumption: --mfu=SHARE gives another'})",
    }


def _saving_rows(recipe: Recipe, world_size: int) -> dict[str, str]:
    one, most = checkpoint_bytes(recipe), num_checkpoints(recipe)
    place, free = free_space(recipe.run.output_dir)
    verdict = "" if one * most <= free else ": NOT ENOUGH; see checkpoint.keep_last, save_interval"
    while_writing = ", held while a checkpoint is written during training" if recipe.checkpoint.asynchronous else ""
    return {
        "checkpoints": f"{most} x {_size(one)} = {_size(most * one)} at most at once; {_size(free)} are free at "
        f"{place}{verdict}",
        "host memory to save": f"{_size(host_bytes_to_save(recipe, world_size))} per rank, besides the program itself"
        f"{while_writing}",
    }


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"
