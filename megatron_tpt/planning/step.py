"""The expected time of a step of a layout, from computation, what it waits for in communication, and the bubble."""

from dataclasses import dataclass

from megatron_tpt.config.recipe import Recipe
from megatron_tpt.models.sizes import model_flops_per_token
from megatron_tpt.planning.communication import Traffic, data_bytes, tensor_bytes, traffic
from megatron_tpt.planning.computation import Computation, PassTime
from megatron_tpt.planning.machine import Machine
from megatron_tpt.training.memory import Memory, estimate_memory, num_microbatches


@dataclass(frozen=True)
class Software:
    """What the training program does about communication."""

    tensor_overlap: bool = False
    """Whether tensor-parallel collectives run in pieces beside the matrix products (Megatron Core's tp_comm_overlap).
    Without it, only those of the backward pass that have a product beside them are hidden."""
    gradient_bytes: int = 4
    """Of a gradient that is reduced: fp32 or bf16."""


THIS_PACKAGE = Software()
"""Runs of this package."""


@dataclass(frozen=True)
class Estimate:
    """A layout on paper. Seconds are of one step; the parts add up to step_s."""

    memory: Memory
    """Of the rank that needs most."""
    traffic: dict[str, Traffic]
    """By kind."""
    num_microbatches: int
    compute_s: float
    """Of the slowest pipeline stage, without what it waits for."""
    waits_s: dict[str, float]
    """What a rank waits for communication, by kind."""
    bubble_s: float
    """What a rank waits for the other pipeline stages."""
    optimizer_s: float
    tokens_per_s: float
    """Of all GPUs."""
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    """Model FLOPs (models.sizes.model_flops_per_token)."""
    mfu: float
    """Of the dense peak in the precision of the matrix products."""

    @property
    def step_s(self) -> float:
        """The whole."""
        return self.compute_s + sum(self.waits_s.values()) + self.bubble_s + self.optimizer_s

    @property
    def bubble_fraction(self) -> float:
        """The bubble over the time of the micro-batches: (p - 1) / (v m)."""
        return self.bubble_s / (self.compute_s + sum(self.waits_s[kind] for kind in _PER_MICRO_BATCH))


_PER_MICRO_BATCH = ("tensor", "context", "pipeline")


def estimate(recipe: Recipe, num_gpus: int, machine: Machine, software: Software = THIS_PACKAGE) -> Estimate:
    """The step of a recipe on `num_gpus` GPUs, at its final batch size.

    With m micro-batches, p stages of v pieces and t seconds for one micro-batch on the slowest stage, a step takes
    (m + (p - 1) / v) t (Narayanan et al., arXiv 2104.04473, section 2.2), what is exposed of the exchange of gradients
    and parameters, and the optimizer. Raises UserError for a precision that the GPU does not have.
    """
    model, parallel, training = recipe.model, recipe.parallel, recipe.training
    p, v, d = (
        parallel.pipeline_parallel_size,
        parallel.virtual_pipeline_parallel_size,
        parallel.data_parallel_size(num_gpus),
    )
    m = num_microbatches(recipe, d)
    computation = Computation(recipe, machine)
    stages = {0, min(1, p - 1), p - 1}  # those between the first and the last are equal
    slowest = max((computation.stage(stage) for stage in stages), key=lambda one: one.total)
    sent = traffic(recipe, num_gpus, machine, software.gradient_bytes)
    waits = _waits(recipe, sent, slowest, m, software, machine.shares.exposed_tensor)
    bubble = (p - 1) / v * (slowest.total + sum(waits.values()) / m)
    waits["data"] = _data_wait(recipe, num_gpus, sent, slowest, m, software)
    optimizer = computation.optimizer(num_gpus)
    step = m * slowest.total + sum(waits.values()) + bubble + optimizer
    tokens_per_s = training.global_batch_size * training.sequence_length / step
    tflops = model_flops_per_token(model, training.sequence_length) * tokens_per_s / num_gpus / 1e12
    return Estimate(
        memory=max(estimate_memory(recipe, d), key=lambda stage: stage.total),
        traffic=sent,
        num_microbatches=m,
        compute_s=m * slowest.total,
        waits_s=waits,
        bubble_s=bubble,
        optimizer_s=optimizer,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=tokens_per_s / num_gpus,
        tflops_per_gpu=tflops,
        mfu=tflops * 1e12 / machine.peak(training.matmul_precision),
    )


def _waits(
    recipe: Recipe, sent: dict[str, Traffic], slowest: PassTime, m: int, software: Software, exposed_tensor: float
) -> dict[str, float]:
    """Seconds of a step that its m micro-batches wait, by kind of communication.

    Tensor: a share of its time with tp_comm_overlap, otherwise what nothing hides. Context: in a ring what attention
    does not hide, otherwise all of it. Pipeline: all of it, but nothing where the stages have pieces, one of which
    computes while another's results travel.
    """
    parallel = recipe.parallel
    seconds = {kind: sent[kind].seconds if kind in sent else 0.0 for kind in _PER_MICRO_BATCH}
    hidden = m * slowest.attention if parallel.context_parallel_exchange == "p2p" else 0.0
    whole, unhidden = tensor_bytes(recipe)
    share = exposed_tensor if software.tensor_overlap or not whole else unhidden / whole
    return {
        "tensor": share * seconds["tensor"],
        "context": max(0.0, seconds["context"] - hidden),
        "pipeline": seconds["pipeline"] if parallel.virtual_pipeline_parallel_size == 1 else 0.0,
    }


def _data_wait(
    recipe: Recipe, num_gpus: int, sent: dict[str, Traffic], slowest: PassTime, m: int, software: Software
) -> float:
    """Seconds of a step that wait for gradients and parameters.

    Without overlap all of it. With it, gradients are reduced beside the backward pass of the last micro-batch, and
    parameters gathered beside the forward pass of the first; in stages of v pieces a piece is done p micro-batches
    before the next one, so that (p (v - 1) + 1) / v micro-batches are beside. FSDP reduces gradients beside every
    backward pass, and what it exchanges when it shards parameters, too, is beside all computation.
    """
    if "data" not in sent:
        return 0.0
    parallel, seconds = recipe.parallel, sent["data"].seconds
    if parallel.fsdp == "optim_grads_params":
        return max(0.0, seconds - m * slowest.total)
    gradients, parameters = data_bytes(recipe, num_gpus, software.gradient_bytes)
    share = gradients / (gradients + parameters)
    p, v = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    window = 1 if v == 1 else (p * (v - 1) + 1) / v
    beside_backward = (m if parallel.fsdp == "optim_grads" else window) * slowest.backward
    beside_forward = window * slowest.forward
    reduction = share * seconds - (beside_backward if parallel.overlap_grad_reduce else 0.0)
    gather = (1 - share) * seconds - (beside_forward if parallel.overlap_param_gather else 0.0)
    return max(0.0, reduction) + max(0.0, gather)
