"""The section of a recipe on the layout over processes."""

from dataclasses import dataclass
from typing import Literal

from megatron_tpt.config.fields import PositiveInt, check_bounds
from megatron_tpt.config.on_change import Effect, on_change
from megatron_tpt.errors import require


@on_change(
    {
        (Effect.REFUSED, Effect.FREE): "distributed_optimizer",
        (Effect.LAYOUT, Effect.FREE): """
            tensor_parallel_size pipeline_parallel_size virtual_pipeline_parallel_size first_stage_layers
            last_stage_layers fsdp overlap_grad_reduce
        """,
        (Effect.FREE, Effect.FREE): """
            context_parallel_size context_parallel_exchange rank_order sequence_parallel
            overlap_param_gather
        """,
    }
)
@dataclass
class ParallelConfig:
    """How the model and the data are spread over processes. The data-parallel size is what remains of the world."""

    tensor_parallel_size: PositiveInt = 1
    """Processes that share each matrix."""
    pipeline_parallel_size: PositiveInt = 1
    """Processes that share the layers."""
    virtual_pipeline_parallel_size: PositiveInt = 1
    """Pieces of the model that each pipeline stage holds, taken in turns with the other stages: a shorter idle time at
    the begin and end of a step for more communication (interleaved 1F1B). 1 is the plain 1F1B schedule."""
    first_stage_layers: PositiveInt | None = None
    """Layers of the first pipeline stage, which has the embedding too; the rest is shared evenly."""
    last_stage_layers: PositiveInt | None = None
    """Layers of the last pipeline stage, which has the output matrix and the loss too; the rest is shared evenly."""
    context_parallel_size: PositiveInt = 1
    """Processes that share each sequence, attention included; needs Transformer Engine's attention, so a GPU."""
    context_parallel_exchange: Literal["p2p", "all_gather", "a2a"] = "p2p"
    """How keys and values reach the other processes of a sequence: round a ring while attention is computed, all at
    once, or by trading sequence for heads (a2a)."""
    rank_order: Literal["tp-cp-dp-pp", "tp-cp-pp-dp"] = "tp-cp-dp-pp"
    """Which processes are neighbours, from next to farthest: tp inside a node; dp before pp keeps gradient exchange
    nearer than the pipeline's."""
    sequence_parallel: bool = False
    """Also split norms and dropout along the sequence over the tensor-parallel group, which must be more than one."""
    distributed_optimizer: bool = True
    """Split the optimizer state over the data-parallel group (ZeRO 1)."""
    fsdp: Literal["none", "optim", "optim_grads", "optim_grads_params"] = "none"
    """Megatron FSDP in place of the buffers of distributed_optimizer: what is split over the data-parallel group. The
    optimizer state (ZeRO 1), gradients too (ZeRO 2), parameters too (ZeRO 3), which are gathered layer by layer."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass begins; needs the two settings above."""

    def __post_init__(self) -> None:
        check_bounds(self, "parallel.")
        for name, default in (
            ("virtual_pipeline_parallel_size", 1),
            ("first_stage_layers", None),
            ("last_stage_layers", None),
        ):
            require(
                getattr(self, name) == default or self.pipeline_parallel_size > 1,
                f"parallel.{name} needs parallel.pipeline_parallel_size > 1: omit it or raise the size",
            )
        require(
            not self.sequence_parallel or self.tensor_parallel_size > 1,
            "parallel.sequence_parallel needs parallel.tensor_parallel_size > 1: turn it off or raise the size",
        )
        require(
            not self.overlap_param_gather or (self.distributed_optimizer and self.overlap_grad_reduce),
            "parallel.overlap_param_gather needs parallel.distributed_optimizer and parallel.overlap_grad_reduce",
        )
        require(
            self.fsdp == "none"
            or (self.distributed_optimizer and self.tensor_parallel_size == self.pipeline_parallel_size == 1),
            f"parallel.fsdp={self.fsdp} needs parallel.distributed_optimizer, and tensor_parallel_size and "
            f"pipeline_parallel_size of 1",
        )
        # Without it Megatron Core 0.19.2 does not reduce the gradients: each rank keeps its own.
        require(
            self.fsdp != "optim" or self.overlap_grad_reduce,
            "parallel.fsdp=optim needs parallel.overlap_grad_reduce",
        )

    @property
    def model_parallel_size(self) -> int:
        """Processes that share one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    def stage_layers(self, num_layers: int) -> list[int]:
        """Layers of each pipeline stage. Raises UserError when they cannot be shared so."""
        given = [self.first_stage_layers, *[None] * (self.pipeline_parallel_size - 2), self.last_stage_layers]
        stages = given if self.pipeline_parallel_size > 1 else [None]
        rest, num_open = num_layers - sum(filter(None, stages)), stages.count(None)
        require(
            rest % num_open == 0 and rest > 0 if num_open else rest == 0,
            f"model.num_layers={num_layers} cannot be shared by parallel.pipeline_parallel_size="
            f"{self.pipeline_parallel_size} stages with first_stage_layers={self.first_stage_layers} and "
            f"last_stage_layers={self.last_stage_layers}: {rest} layers are left for {num_open} equal stages",
        )
        return [rest // num_open if stage is None else stage for stage in stages]

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model that `world_size` processes hold. Raises UserError when that is no whole number."""
        require(
            world_size % self.model_parallel_size == 0,
            f"{world_size} processes cannot hold parallel.tensor_parallel_size={self.tensor_parallel_size} x "
            f"pipeline_parallel_size={self.pipeline_parallel_size} x context_parallel_size={self.context_parallel_size}"
            f": start a multiple of {self.model_parallel_size} (torchrun --nproc-per-node), or change the sizes",
        )
        return world_size // self.model_parallel_size
