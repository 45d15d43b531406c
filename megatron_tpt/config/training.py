"""The section of a recipe on steps, batches and precision."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_tpt.config.fields import NonNegativeInt, PositiveFloat, PositiveInt, check_bounds
from megatron_tpt.config.on_change import Effect, on_change
from megatron_tpt.errors import UserError, require


@on_change({(Effect.ALLOWED, Effect.FREE): "num_steps global_batch_size sequence_length"})
@dataclass
class BatchSizeStage:
    """Some steps with another batch size, at the beginning of a run."""

    num_steps: PositiveInt
    """Optimizer steps with this size."""
    global_batch_size: PositiveInt
    """Samples per optimizer step, over all processes."""
    sequence_length: PositiveInt | None = None
    """Of steps that are done, their tokens per sample. A run that resumes with another batch size or length
    (data.allow_change) writes it, so that its recipe says what it has consumed; not for new runs."""

    def __post_init__(self) -> None:
        check_bounds(self, "training.batch_size_ramp: ")


def _step_range(text: int | str) -> range:
    """The steps that "7" or "7-9" names, numbered from 1."""
    first, _, last = str(text).partition("-")
    if not (first.strip().isdecimal() and (last or first).strip().isdecimal()):
        raise UserError(f"training.skip_steps: {text!r} is no step: give numbers (1200) or ranges (1200-1250)")
    steps = range(int(first), int(last or first) + 1)
    require(len(steps) > 0 and steps[0] >= 1, f"training.skip_steps: {text!r} must count upwards from 1")
    return steps


@on_change(
    {
        (Effect.ALLOWED, Effect.FREE): "sequence_length global_batch_size batch_size_ramp",
        (Effect.PRECISION, Effect.FREE): "dtype",
        (Effect.WARNED, Effect.FREE): """
            fp8 fp8_format fp8_amax_history fp8_param_gather bf16_layers_at_start bf16_layers_at_end
        """,
        (Effect.NONE, Effect.FREE): "init_from new_token_rows",
        (Effect.FREE, Effect.FREE): """
            num_steps skip_steps micro_batch_size recompute recompute_modules recompute_layers
            cpu_offload_layers allow_other_tokenizer validation_interval validation_steps
            manual_gc_interval
        """,
    }
)
@dataclass
class TrainingConfig:
    """Duration, batches and precision of training."""

    num_steps: PositiveInt = 100
    """Optimizer steps of the whole run. A run may resume with more of them than it was started with, unless that
    reads pre-training data more often than planned: its epochs are shuffled together. A schedule
    that decays until num_steps is stretched, and the rate jumps: resume from before the decay (constant, wsd), or give
    optimizer.decay_steps."""
    sequence_length: PositiveInt = 128
    """Tokens per sample."""
    global_batch_size: PositiveInt = 8
    """Samples per optimizer step, over all processes."""
    batch_size_ramp: list[BatchSizeStage] = field(default_factory=list)
    """Batch sizes to begin with, one after the other, before global_batch_size holds."""
    skip_steps: list[int | str] = field(default_factory=list)
    """Steps whose data is skipped without an update, as the console numbers them: numbers and ranges (1200-1250).
    The learning rate continues as if they were done."""
    micro_batch_size: PositiveInt = 1
    """Samples in one forward pass of one process."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the forward and backward pass; bfloat16 keeps fp32 main weights and accumulates
    gradients in fp32."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """Matrix products of the layers in FP8 through Transformer Engine, by how values are scaled: one factor per tensor
    from earlier steps (delayed) or from the tensor itself (tensorwise), one per 128 x 128 weights and 128 inputs
    (blockwise, Hopper with CUDA 12.9), one per 32 values (mxfp8, Blackwell). It is an error where it is not active."""
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"
    """E4M3 forward and E5M2 for gradients (hybrid), or E4M3 for both, as is usual with blockwise and mxfp8."""
    fp8_amax_history: PositiveInt = 1024
    """Steps over which delayed scaling takes the largest value."""
    fp8_param_gather: bool = False
    """Keep the matrices of the layers only in FP8 and gather them so after an update: half the memory and traffic of
    bf16. The optimizer's fp32 main weights stay. Not with mxfp8."""
    bf16_layers_at_start: NonNegativeInt = 0
    """First layers to leave in bf16 under fp8; not with delayed scaling."""
    bf16_layers_at_end: NonNegativeInt = 0
    """Last layers to leave in bf16 under fp8; not with delayed scaling."""
    recompute: Literal["none", "selective", "full", "block"] = "none"
    """Activations to compute again in the backward pass instead of keeping them: those of recompute_modules, all of
    every layer, or all of the first recompute_layers of each pipeline stage (block)."""
    recompute_modules: list[Literal["core_attn", "mlp"]] = field(default_factory=lambda: ["core_attn"])
    """What selective recomputation computes again. Transformer Engine's attention keeps no scores: there core_attn
    saves little, and mlp much."""
    recompute_layers: PositiveInt = 1
    """Layers of each pipeline stage that block recomputation computes again."""
    cpu_offload_layers: NonNegativeInt = 0
    """Layers whose activations wait in CPU memory for the backward pass; needs Transformer Engine, no pipeline, no
    recomputation."""
    init_from: Path | None = None
    """Checkpoint folder whose weights (nothing else) the run starts from; random weights when not given."""
    allow_other_tokenizer: bool = False
    """Start from init_from although its tokenizer is not the data's; without, that is refused."""
    new_token_rows: Literal["mean", "keep"] = "mean"
    """Rows of the embedding and the output matrix for tokens that the tokenizer of init_from lacks: the mean of the
    others (mean), or as the checkpoint has them, zeros beyond its vocabulary (keep)."""
    validation_interval: NonNegativeInt = 0
    """Steps between validations on data.validation, with one more after the last step; 0 never validates."""
    validation_steps: PositiveInt | Literal["all"] = 8
    """Global batches per validation and set, the same every time; or all: every sample of a set exactly once."""
    manual_gc_interval: NonNegativeInt = 0
    """Steps between collections of Python garbage, on all ranks at once; 0 leaves them to Python."""

    def __post_init__(self) -> None:
        check_bounds(self, "training.")
        self.skips(0)  # refuses what names no step
        require(
            self.fp8 == "none" or self.dtype == "bfloat16", f"training.fp8={self.fp8} needs training.dtype=bfloat16"
        )
        require(
            not self.fp8_param_gather or self.fp8 in ("delayed", "tensorwise", "blockwise"),
            f"training.fp8_param_gather needs training.fp8=delayed, tensorwise or blockwise, not {self.fp8}",
        )
        has_bf16_layers = self.bf16_layers_at_start > 0 or self.bf16_layers_at_end > 0
        require(
            not has_bf16_layers or self.fp8 not in ("none", "delayed"),
            f"training.bf16_layers_at_start and bf16_layers_at_end need training.fp8=tensorwise, blockwise or mxfp8, "
            f"not {self.fp8}",
        )
        require(
            self.recompute != "selective" or len(self.recompute_modules) > 0,
            "training.recompute_modules is empty: name some, or give training.recompute=none",
        )
        require(
            self.cpu_offload_layers == 0 or self.recompute == "none",
            f"training.cpu_offload_layers and training.recompute={self.recompute} exclude each other: give one of them",
        )

    def batch_size(self, step: int) -> int:
        """Samples of the optimizer step that follows `step` others, over all processes."""
        for stage in self.batch_size_ramp:
            if step < stage.num_steps:
                return stage.global_batch_size
            step -= stage.num_steps
        return self.global_batch_size

    def num_samples(self, num_steps: int) -> int:
        """Samples that the first `num_steps` steps take together, skipped steps included. Steps done with samples of
        another length count as the samples of sequence_length that have their tokens."""
        samples = 0
        for stage in self.batch_size_ramp:
            steps = min(num_steps, stage.num_steps)
            tokens = steps * stage.global_batch_size * (stage.sequence_length or self.sequence_length)
            samples, num_steps = samples - (-tokens // self.sequence_length), num_steps - steps
        return samples + num_steps * self.global_batch_size

    def skips(self, step: int) -> bool:
        """Whether `step` (numbered from 1) is one of skip_steps."""
        return any([step in _step_range(item) for item in self.skip_steps])

    @property
    def matmul_precision(self) -> str:
        """What the matrix products of the layers are computed in, by its name in data sheets: fp8, bf16 or fp32."""
        return {"bfloat16": "bf16", "float32": "fp32"}[self.dtype] if self.fp8 == "none" else "fp8"

    @property
    def batch_sizes(self) -> set[int]:
        """Every global batch size of the run, but for the steps that are done."""
        ramp = [stage.global_batch_size for stage in self.batch_size_ramp if stage.sequence_length is None]
        return {self.global_batch_size, *ramp}

    @property
    def num_steps_done(self) -> int:
        """Steps before the run resumed with another batch size or sequence length; 0 where it has not."""
        return sum(stage.num_steps for stage in self.batch_size_ramp if stage.sequence_length is not None)


@on_change({(Effect.FREE, Effect.FREE): "num_epochs"})
@dataclass
class SftTrainingConfig(TrainingConfig):
    """Duration, batches and precision of training."""

    num_epochs: PositiveFloat | None = None
    """Times over the data, in place of num_steps, which follows from it; for packed indices (tools/pack_sft.py)."""
    validation_steps: PositiveInt | Literal["all"] = "all"
    """Global batches per validation and set, the same every time and no example twice; or all."""
