"""The memory that each rank of a layout needs, and the maximum throughput of its devices: pure functions.

Activations are counted as in Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv
2205.05198, sections 4 and 5), from the activations per layer that the model family declares. Temporary buffers, the
padding of buffers and fragmentation are not included.
"""

import dataclasses

from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.models.sizes import model_flops_per_token, stage_matrices, stage_parameters
from megatron_tpt.training.devices import Device
from megatron_tpt.training.metrics import device_peak_tflops

COMFORTABLE_SHARE = 0.85
"""Of a device's memory: the rest is for temporary buffers, padding and fragmentation, which are not estimated."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Estimated bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations


def _value_bytes(recipe: Recipe) -> int:
    """Of a weight or activation in the training precision."""
    return 4 if recipe.training.dtype == "float32" else 2


def micro_batch_tokens(recipe: Recipe) -> float:
    """Tokens of one micro-batch on a rank."""
    training = recipe.training
    return training.sequence_length * training.micro_batch_size / recipe.parallel.context_parallel_size


def _layer_values(recipe: Recipe) -> dict[str, float]:
    """Values that one layer keeps for the backward pass of one micro-batch on a rank, by the module that makes them."""
    parallel, training = recipe.parallel, recipe.training
    t, tokens = parallel.tensor_parallel_size, micro_batch_tokens(recipe)
    return {
        name: tokens * kept.per_token / (t if kept.is_split or parallel.sequence_parallel else 1)
        for name, kept in recipe.model.activations(training.sequence_length).items()
    }


def num_microbatches(recipe: Recipe, data_parallel_size: int) -> int:
    """Micro-batches of a step on a rank, once the batch size has its final value."""
    training = recipe.training
    return max(1, training.global_batch_size // (training.micro_batch_size * data_parallel_size))


def micro_batches_in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> float:
    """The most micro-batches whose activations a pipeline stage (from 0) of p holds, in units of its layers.

    1F1B: p - stage. Interleaved with v chunks: 2 (p - stage - 1) + (v - 1) p + 1 chunks, each 1/v of the layers.
    """
    p, v = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    if v == 1:
        return min(p - stage, micro_batches)
    return min(2 * (p - stage - 1) + (v - 1) * p + 1, micro_batches * v) / v


def stage_activations(recipe: Recipe, stage: int, micro_batches: int) -> float:
    """Bytes of activations on a rank of a pipeline stage (from 0), given what the recipe recomputes.

    Recomputed layers keep only their input, and one at a time keeps everything; the last stage also has the logits of
    one micro-batch, in the training precision and in fp32. Each stage has its share of model.activation_layers.
    """
    model, parallel, training = recipe.model, recipe.parallel, recipe.training
    value_bytes, tokens = _value_bytes(recipe), micro_batch_tokens(recipe)
    values = _layer_values(recipe)
    layers = parallel.stage_layers(model.num_layers)[stage] * model.activation_layers / model.num_layers
    own_input = tokens * model.hidden_size / (parallel.tensor_parallel_size if parallel.sequence_parallel else 1)
    whole = sum(values.values())
    kept, once = layers * whole, 0.0
    if training.recompute == "selective":
        once = sum(values[module] for module in training.recompute_modules)
        kept = layers * (whole - once)
    elif training.recompute in ("full", "block"):
        recomputed = layers if training.recompute == "full" else min(layers, training.recompute_layers)
        kept, once = (layers - recomputed) * whole + recomputed * own_input, whole
    elif training.cpu_offload_layers:
        kept = (layers - training.cpu_offload_layers) * whole
    result = (kept * micro_batches_in_flight(parallel, stage, micro_batches) + once) * value_bytes
    if stage == parallel.pipeline_parallel_size - 1:
        result += tokens * model.padded_vocab_size / parallel.tensor_parallel_size * (value_bytes + 4)
    return result


def estimate_memory(recipe: Recipe, data_parallel_size: int) -> list[Memory]:
    """Memory per rank of every pipeline stage.

    Weights are in the training precision (FP8 copies not counted), gradients in fp32, Adam's two moments or Muon's one
    in fp32 and, in bf16 training, main weights in fp32. The distributed optimizer shards the last two over the data-
    and context-parallel ranks; Muon's by whole matrices, so only roughly evenly. FSDP also shards gradients and
    weights; the gathered weights of the current layer are not counted. Models beside the recipe's, such as a reference
    or a critic, have their share of all but the activations, which one model needs at a time. Engines are not counted.
    """
    num_frozen, num_trained = recipe.models_beside
    parallel, training = recipe.parallel, recipe.training
    value_bytes, state_bytes = _value_bytes(recipe), 8 if training.dtype == "float32" else 12
    shards = data_parallel_size * parallel.context_parallel_size if parallel.distributed_optimizer else 1
    result = []
    for stage in range(parallel.pipeline_parallel_size):
        parameters = stage_parameters(recipe.model, parallel, stage)
        state = parameters * state_bytes
        if recipe.optimizer.name == "muon":
            state -= 4 * stage_matrices(recipe.model, parallel, stage)
        weights = parameters * value_bytes / (shards if parallel.fsdp == "optim_grads_params" else 1)
        gradients = parameters * 4 / (shards if parallel.fsdp in ("optim_grads", "optim_grads_params") else 1)
        activations = stage_activations(recipe, stage, num_microbatches(recipe, data_parallel_size))
        trained = 1 + num_trained
        result.append(
            Memory(weights * (trained + num_frozen), gradients * trained, state / shards * trained, activations)
        )
    return result


def checkpoint_bytes(recipe: Recipe) -> int:
    """Size of a checkpoint: weights in the training precision and the optimizer's state, whatever the layout.

    The distributed optimizer also keeps the weights in fp32, as every optimizer does in bf16 training; Muon has one
    moment for the matrices of the layers. Other trained models, such as a critic, have checkpoints of the same size.
    Small files (recipe, tokenizer, random states) are not counted.
    """
    model, training = recipe.model, recipe.training
    keeps_weights = training.dtype != "float32" or recipe.parallel.distributed_optimizer
    num_bytes = model.num_parameters() * (_value_bytes(recipe) + (12 if keeps_weights else 8))
    if recipe.optimizer.name == "muon":
        num_bytes -= 4 * stage_matrices(model, ParallelConfig(), stage=0)
    return num_bytes * (1 + recipe.models_beside[1])


def num_checkpoints(recipe: Recipe) -> int:
    """The most checkpoints that a run has on disk at once: those kept and the one being written."""
    checkpoint, num_steps = recipe.checkpoint, recipe.training.num_steps
    interval = checkpoint.save_interval or num_steps
    steps = sorted({*range(interval, num_steps + 1, interval), num_steps})
    if checkpoint.keep_last is None:
        return len(steps)
    older = steps[: -checkpoint.keep_last]
    kept = sum(1 for step in older if checkpoint.keep_every is not None and step % checkpoint.keep_every == 0)
    return min(len(steps), checkpoint.keep_last + kept + 1)


def host_bytes_to_save(recipe: Recipe, world_size: int) -> float:
    """Host memory that a rank needs to save a checkpoint: a copy of its share and, for checkpoint.optimizer_sharding=
    fully_reshardable, the optimizer's state of its data-parallel group."""
    parallel = recipe.parallel
    gathered = 0
    if parallel.distributed_optimizer and recipe.checkpoint.optimizer_sharding == "fully_reshardable":
        stages = range(parallel.pipeline_parallel_size)
        gathered = 12 * max(stage_parameters(recipe.model, parallel, stage) for stage in stages)
    return gathered + checkpoint_bytes(recipe) / world_size


def peak_of(recipe: Recipe, device: Device) -> tuple[float, str] | None:
    """The dense peak of one device in TFLOP/s that MFU is based on, and its origin: logging.peak_tflops, otherwise that
    of the device; None if neither is known."""
    if recipe.logging.peak_tflops is not None:
        return recipe.logging.peak_tflops, "logging.peak_tflops"
    precision = recipe.training.matmul_precision
    peak = device_peak_tflops(device.name, precision)
    return None if peak is None else (peak, f"dense {precision} of {device.name}")


def tokens_per_s_bound(recipe: Recipe, world_size: int, peak_tflops: float) -> float:
    """Tokens per second of all devices at 100% MFU, in the mean over a run: their peak over model_flops_per_token."""
    flops = model_flops_per_token(
        recipe.model, recipe.training.sequence_length, recipe.model.expected_passes(recipe.training.num_steps)
    )
    return peak_tflops * 1e12 * world_size / flops
