"""Everything that decides a training run, as nested dataclasses; a recipe file is their YAML.

A field's docstring is its documentation: it is what `--help` prints. `__post_init__` refuses what can be seen in one
section; `megatron_tpt.config.load.check` what needs several, and the number of processes.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_tpt.config.model import ModelConfig, default_model
from megatron_tpt.config.optimizer import OptimizerConfig
from megatron_tpt.errors import UserError, require


@dataclass
class RunConfig:
    """Where a run lives and what makes it reproducible."""

    output_dir: Path = Path("runs/default")
    """The run folder: run.yaml, checkpoints/, tensorboard/, metrics.jsonl. The same folder again resumes the run."""
    seed: int = 1234
    """Decides the initial weights, the data order and dropout."""
    threads_per_process: int | None = None
    """CPU threads of each process; torch's choice (OMP_NUM_THREADS) when not given. Losses are the same to the bit only
    for the same number."""
    distributed_timeout_s: int = 600
    """A collective that waits longer for another rank fails."""
    time_limit_min: float | None = None
    """Minutes from the start after which the program must have stopped; the end of the SLURM job when not given."""
    time_limit_margin_min: float = 5.0
    """Minutes before that limit to stop with a checkpoint (exit code 75: the same command resumes), but at most a tenth
    of the time that there was."""
    first_step_timeout_s: int = 1800
    """The same until the first step is done: loading, opening data and choosing kernels take ranks unequally long."""
    hang_timeout_s: float | None = None
    """When a rank takes no micro-batch and ends no step for so long, the rank that the others wait for is named, the
    stacks of all go to RUN/logs/, and the run ends with code 1. Half of distributed_timeout_s when not given; 0: never.
    A checkpoint may take as long as the first step."""

    def __post_init__(self) -> None:
        require(
            0 < self.distributed_timeout_s <= self.first_step_timeout_s,
            f"run.distributed_timeout_s={self.distributed_timeout_s} must lie between 1 and run.first_step_timeout_s="
            f"{self.first_step_timeout_s}: raise that or lower it",
        )
        require(
            self.hang_timeout_s is None or 0 <= self.hang_timeout_s < self.distributed_timeout_s,
            f"run.hang_timeout_s={self.hang_timeout_s} must lie below run.distributed_timeout_s="
            f"{self.distributed_timeout_s}, or collectives fail before it is known why: lower it or raise that",
        )

    @property
    def resolved_hang_timeout_s(self) -> float:
        """The time after which a run counts as hung; infinite for never."""
        if self.hang_timeout_s is None:
            return self.distributed_timeout_s / 2
        return self.hang_timeout_s or float("inf")


@dataclass
class DatasetSource:
    """One indexed dataset in a blend."""

    path: Path
    """Prefix of the files PREFIX.bin, PREFIX.idx and PREFIX.json that tools/index.py wrote."""
    weight: float = 1.0
    """Share of the training samples drawn from here, relative to the other weights."""
    name: str | None = None
    """Name in the metrics; sources of one name are counted together. The last part of the path when not given."""
    max_epochs: float | None = None
    """Refuse a run that reads this source more often; no limit when not given."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data: weight {self.weight} of {self.path} must be above 0")
        require(
            self.max_epochs is None or self.max_epochs > 0,
            f"data: max_epochs {self.max_epochs} of {self.path} must be above 0",
        )

    @property
    def shown_name(self) -> str:
        """The name given, or the last part of the path."""
        return self.name or self.path.name


@dataclass
class DataPhase:
    """A part of a run with a blend of its own."""

    train: list[DatasetSource] = field(default_factory=list)
    """The blend to train on, as in data.train."""
    until_tokens: float | None = None
    """Training tokens of the run, from its start, after which the next phase begins; the last phase needs none."""

    def end_sample(self, sequence_length: int) -> int | None:
        """The number of samples after which the next phase begins: the first that reaches the tokens."""
        return None if self.until_tokens is None else -(-int(self.until_tokens) // sequence_length)


@dataclass
class DataConfig:
    """Pre-training data: indexed datasets, cut into samples of training.sequence_length tokens.

    A source is a prefix, or {path, weight, ...}. A path with wildcards (data/shard-*) stands for all indices that it
    matches, by the tokens that each has; one that ends with .yaml or .json for the list of sources in that file.
    """

    train: list[DatasetSource] = field(default_factory=list)
    """The blend to train on."""
    phases: list[DataPhase] = field(default_factory=list)
    """Blends to train on one after the other, in place of train. A source in several continues where it was."""
    validation: list[DatasetSource] = field(default_factory=list)
    """Sets whose losses are measured every training.validation_interval steps and at the end: over all of their tokens
    and, where there are several, each by itself. Those of one name are one set, a blend."""
    tokenizer: Path | None = None
    """Folder of the tokenizer that the data was indexed with, for the checkpoints; where it was then when not given."""
    allow_change: bool = False
    """Resume from a checkpoint with other training data than before, more times through it, or another batch size or
    sequence length, at the samples consumed; without, that is refused."""
    reset_at_documents: bool = False
    """A token attends to its own document alone, and positions count from 0 in each; without, to all before it in the
    sample."""
    loss_on: Literal["all", "document", "thinking"] = "all"
    """Tokens to learn from; the others are only read."""
    mock: bool = False
    """Random tokens in place of files, to measure speed; needs model.vocab_size."""
    cache_dir: Path | None = None
    """Where the sample indices are kept; `cache/` beside the first training index when not given."""
    num_workers: int = 0
    """Processes per rank that read ahead; 0 reads in the training process."""

    def __post_init__(self) -> None:
        require(
            bool(self.train) + bool(self.phases) + self.mock <= 1,
            "data: give one of train, phases and mock: what is in train can be the first of phases",
        )
        ends = [0.0, *(phase.until_tokens or 0.0 for phase in self.phases[:-1])]
        require(
            all(end > begin for begin, end in itertools.pairwise(ends)),
            f"data.phases: until_tokens must be there and grow in all but the last: {ends[1:]}",
        )
        require(all(phase.train for phase in self.phases), "data.phases: a phase has no data: give its train")

    @property
    def all_phases(self) -> list[DataPhase]:
        """The phases; one that never ends when there is data.train."""
        return self.phases or [DataPhase(self.train)]


@dataclass
class ExampleSet:
    """Examples to validate with."""

    path: Path
    """Prefix of a packed index, or a file of JSON lines, as in data.train."""
    name: str | None = None
    """Name in the metrics; those of one name are one set. The last part of the path when not given."""

    @property
    def shown_name(self) -> str:
        """The name given, or the last part of the path."""
        return self.name or self.path.name


@dataclass
class SftDataConfig:
    """Fine-tuning data: conversations, or prompts and responses; the loss is on what the assistant says alone."""

    train: list[Path] = field(default_factory=list)
    """Prefixes of indices that tools/pack_sft.py has packed; or files (JSON lines, packed or not, Parquet, Arrow)
    with the fields `prompt` and `response`, which are tokenised and packed at the start of every run."""
    validation: list[ExampleSet] = field(default_factory=list)
    """Sets whose losses on the learned tokens are measured every training.validation_interval steps and at the end:
    over all of them and, where there are several, each by itself. A path, or {path, name}."""
    tokenizer: Path | None = None
    """Hugging Face tokenizer folder; that of the packed data (PREFIX.tokenizer), else of training.init_from, when not
    given."""
    prompt_field: str = "prompt"
    """Name of the field that holds the prompt."""
    response_field: str = "response"
    """Name of the field that holds the response."""
    on_too_long: Literal["stop", "skip"] = "stop"
    """What to do with an example longer than training.sequence_length: stop, or skip it and say how many."""
    allow_change: bool = False
    """Resume from a checkpoint with other training data than before, or another batch size or sequence length, at the
    samples consumed; without, that is refused."""
    num_workers: int = 0
    """Processes per rank that read ahead; 0 reads in the training process."""


@dataclass
class ParallelConfig:
    """How the model and the data are spread over processes. The data-parallel size is what remains of the world."""

    tensor_parallel_size: int = 1
    """Processes that share each matrix."""
    pipeline_parallel_size: int = 1
    """Processes that share the layers."""
    virtual_pipeline_parallel_size: int = 1
    """Pieces of the model that each pipeline stage holds, taken in turns with the other stages: a shorter idle time at
    the begin and end of a step for more communication (interleaved 1F1B). 1 is the plain 1F1B schedule."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline stage, which has the embedding too; the rest is shared evenly."""
    last_stage_layers: int | None = None
    """Layers of the last pipeline stage, which has the output matrix and the loss too; the rest is shared evenly."""
    context_parallel_size: int = 1
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
        sizes = ("tensor", "pipeline", "virtual_pipeline", "context")
        for name in [f"{size}_parallel_size" for size in sizes] + ["first_stage_layers", "last_stage_layers"]:
            value = getattr(self, name)
            require(value is None or value >= 1, f"parallel.{name}={value} must be 1 or more")
        for name, default in (
            ("virtual_pipeline_parallel_size", 1),
            ("first_stage_layers", None),
            ("last_stage_layers", None),
        ):
            require(
                getattr(self, name) == default or self.pipeline_parallel_size > 1,
                f"parallel.{name} needs parallel.pipeline_parallel_size > 1: leave it out or raise the size",
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
        # Megatron Core 0.19.2 does not reduce the gradients otherwise: they are each rank's own.
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


@dataclass
class BatchSizeStage:
    """Some steps with another batch size, at the beginning of a run."""

    num_steps: int
    """Optimizer steps with this size."""
    global_batch_size: int
    """Samples per optimizer step, over all processes."""
    sequence_length: int | None = None
    """Of steps that are done, their tokens per sample. A run that resumes with another batch size or length
    (data.allow_change) writes it, so that its recipe says what it has consumed; not for new runs."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "global_batch_size", "sequence_length"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"training.batch_size_ramp: {name}={value} must be 1 or more")


def _step_range(text: int | str) -> range:
    """The steps that "7" or "7-9" names, numbered from 1."""
    first, _, last = str(text).partition("-")
    if not (first.strip().isdecimal() and (last or first).strip().isdecimal()):
        raise UserError(f"training.skip_steps: {text!r} is no step: give numbers (1200) or ranges (1200-1250)")
    steps = range(int(first), int(last or first) + 1)
    require(len(steps) > 0 and steps[0] >= 1, f"training.skip_steps: {text!r} must count upwards from 1")
    return steps


@dataclass
class TrainingConfig:
    """How long, in what portions and in which precision."""

    num_steps: int = 100
    """Optimizer steps of the whole run. A run resumes from its checkpoints with more of them than it was started with,
    unless pre-training data is then read more often than planned: its epochs are shuffled together. A schedule
    that decays until num_steps is stretched, and the rate jumps: resume from before the decay (constant, wsd), or give
    optimizer.decay_steps."""
    sequence_length: int = 128
    """Tokens per sample."""
    global_batch_size: int = 8
    """Samples per optimizer step, over all processes."""
    batch_size_ramp: list[BatchSizeStage] = field(default_factory=list)
    """Batch sizes to begin with, one after the other, before global_batch_size holds."""
    skip_steps: list[int | str] = field(default_factory=list)
    """Steps whose data is skipped without an update, as the console numbers them: numbers and ranges (1200-1250).
    The learning rate continues as if they were done."""
    micro_batch_size: int = 1
    """Samples in one forward pass of one process."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of the forward and backward pass; bf16 keeps fp32 main weights and accumulates gradients in fp32."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """Matrix products of the layers in FP8 through Transformer Engine, by how values are scaled: one factor per tensor
    from earlier steps (delayed) or from the tensor itself (tensorwise), one per 128 x 128 weights and 128 inputs
    (blockwise, Hopper with CUDA 12.9), one per 32 values (mxfp8, Blackwell). It is an error where it is not active."""
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"
    """E4M3 forward and E5M2 for gradients, or E4M3 for both."""
    fp8_amax_history: int = 1024
    """Steps over which delayed scaling takes the largest value."""
    fp8_param_gather: bool = False
    """Keep the matrices of the layers in FP8 alone and gather them so after an update: half the memory and traffic of
    bf16. The optimizer's fp32 main weights stay. Not with mxfp8."""
    bf16_layers_at_start: int = 0
    """First layers to leave in bf16 under fp8; not with delayed scaling."""
    bf16_layers_at_end: int = 0
    """Last layers to leave in bf16 under fp8; not with delayed scaling."""
    recompute: Literal["none", "selective", "full", "block"] = "none"
    """Activations to compute again in the backward pass instead of keeping them: those of recompute_modules, all of
    every layer, or all of the first recompute_layers of each pipeline stage (block)."""
    recompute_modules: list[Literal["core_attn", "mlp"]] = field(default_factory=lambda: ["core_attn"])
    """What selective recomputation computes again. Transformer Engine's attention keeps no scores: there core_attn
    saves little, and mlp much."""
    recompute_layers: int = 1
    """Layers of each pipeline stage that block recomputation computes again."""
    cpu_offload_layers: int = 0
    """Layers whose activations wait in CPU memory for the backward pass; needs Transformer Engine, no pipeline, no
    recomputation."""
    init_from: Path | None = None
    """Checkpoint folder whose weights (nothing else) the run starts from; random weights when not given."""
    allow_other_tokenizer: bool = False
    """Start from init_from although its tokenizer is not the data's; without, that is refused."""
    new_token_rows: Literal["mean", "keep"] = "mean"
    """Rows of the embedding and the output matrix for tokens that the tokenizer of init_from lacks: the mean of the
    others (mean), or as the checkpoint has them, zeros beyond its vocabulary (keep)."""
    validation_interval: int = 0
    """Steps between validations on data.validation, with one more after the last step; 0 never validates."""
    validation_steps: int | Literal["all"] = 8
    """Global batches per validation and set, the same every time; or all: every sample of a set exactly once."""
    manual_gc_interval: int = 0
    """Steps between collections of Python garbage, on all ranks at once; 0 leaves them to Python."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "sequence_length", "global_batch_size", "micro_batch_size"):
            require(getattr(self, name) >= 1, f"training.{name}={getattr(self, name)} must be 1 or more")
        self.skips(0)  # refuses what names no step
        require(self.fp8 == "none" or self.dtype == "bf16", f"training.fp8={self.fp8} needs training.dtype=bf16")
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
            self.validation_steps == "all" or self.validation_steps >= 1,
            f"training.validation_steps={self.validation_steps} must be 1 or more, or all",
        )
        for name in (
            "bf16_layers_at_start",
            "bf16_layers_at_end",
            "cpu_offload_layers",
            "validation_interval",
            "manual_gc_interval",
        ):
            require(getattr(self, name) >= 0, f"training.{name}={getattr(self, name)} must be 0 or more")
        for name in ("fp8_amax_history", "recompute_layers"):
            require(getattr(self, name) >= 1, f"training.{name}={getattr(self, name)} must be 1 or more")
        require(
            self.recompute != "selective" or len(self.recompute_modules) > 0,
            "training.recompute_modules is empty: name some, or give training.recompute=none",
        )
        require(
            self.cpu_offload_layers == 0 or self.recompute == "none",
            f"training.cpu_offload_layers does not go with training.recompute={self.recompute}: give up one of them",
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
    def batch_sizes(self) -> set[int]:
        """Every global batch size of the run, but for the steps that are done."""
        ramp = [stage.global_batch_size for stage in self.batch_size_ramp if stage.sequence_length is None]
        return {self.global_batch_size, *ramp}

    @property
    def num_steps_done(self) -> int:
        """Steps before the run resumed with another batch size or sequence length; 0 where it has not."""
        return sum(stage.num_steps for stage in self.batch_size_ramp if stage.sequence_length is not None)


@dataclass
class SftTrainingConfig(TrainingConfig):
    """How long, in what portions and in which precision."""

    num_epochs: float | None = None
    """Times over the data, in place of num_steps, which follows from it; for packed indices (tools/pack_sft.py)."""
    validation_steps: int | Literal["all"] = "all"
    """Global batches per validation and set, the same every time and no example twice; or all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_epochs is None or self.num_epochs > 0,
            f"training.num_epochs={self.num_epochs} must be above 0",
        )


@dataclass
class CheckpointConfig:
    """What is kept to resume from."""

    save_interval: int = 0
    """Steps between checkpoints; the last step is always saved, 0 saves nothing else."""
    keep_last: int | None = None
    """Older checkpoints are deleted when there are more than this; all are kept when not given."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides are never deleted."""
    asynchronous: bool = False
    """Write checkpoints beside training, which continues after a copy of weights and optimizer to host memory: there
    must be room for it. The last checkpoint of a run, or before a stop, is waited for."""
    optimizer_sharding: Literal["fully_reshardable", "dp_reshardable"] = "fully_reshardable"
    """Form of the distributed optimizer's state. The first resumes under any layout, but every rank gathers all that
    its data-parallel group has into its machine's memory, 12 bytes for each of the parameters that a rank computes
    with; the second is written as the ranks have it, which large models need, and resumes under the same tensor- and
    pipeline-parallel sizes alone, at any data-parallel size."""
    verify: bool = True
    """Compare the content of a checkpoint with its checksums before resuming from it; without, only the sizes of its
    files. A damaged one is set aside, and the run resumes from the one before."""

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"checkpoint.{name}={value} must be 1 or more")


@dataclass
class FaultsConfig:
    """What happens when training goes wrong."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """When the loss or a gradient is not finite: stop with a diagnosis, skip the update of that batch, or return to
    the last checkpoint and skip the data of the steps since."""
    on_loss_spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    """The same for a loss above loss_spike_factor times the median loss of the last loss_spike_window good steps."""
    loss_spike_factor: float = 2.0
    """How much higher than usual a loss must be."""
    loss_spike_window: int = 50
    """Steps that say what is usual."""
    max_skips: int = 10
    """Batches skipped in a row before the run stops."""
    max_rollbacks: int = 3
    """Times that a run returns to a checkpoint before it stops."""
    desync_interval: int = 100
    """Steps between comparisons of the weights of all ranks that hold a copy of them, by checksums; where they differ
    the run ends with code 1 and names the ranks. 0: never."""
    rerun: Literal["off", "diagnose", "recover"] = "diagnose"
    """Recompute a bad step on the same batch, and say whether the result was the same (the data or the
    software) or another (the hardware of a rank); with recover a second result that is good is taken, and training goes
    on. Not under training.fp8=delayed, whose scales the first time has changed."""

    def __post_init__(self) -> None:
        require(self.loss_spike_factor > 1, f"faults.loss_spike_factor={self.loss_spike_factor} must be above 1")
        require(self.desync_interval >= 0, f"faults.desync_interval={self.desync_interval} must be 0 or more")
        require(self.loss_spike_window >= 2, f"faults.loss_spike_window={self.loss_spike_window} must be 2 or more")


@dataclass
class LoggingConfig:
    """What is reported and how often."""

    log_interval: int = 10
    """Steps between lines on the console, in metrics.jsonl and in TensorBoard; the values are means over them."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    peak_tflops: float | None = None
    """Dense peak of one accelerator in TFLOP/s, of which MFU is a part; from a table of NVIDIA's A100, H100, H200 and
    B200 when not given. There is no MFU on devices that are not in it."""
    straggler_factor: float = 1.5
    """Name the ranks that take more than this many times as long as the median rank for data, forward and backward."""
    wandb_project: str | None = None
    """Also report to this project of Weights & Biases (package wandb; its key is read from its own settings)."""

    def __post_init__(self) -> None:
        require(self.log_interval >= 1, f"logging.log_interval={self.log_interval} must be 1 or more")
        require(self.straggler_factor > 1, f"logging.straggler_factor={self.straggler_factor} must be above 1")


@dataclass
class ProfilingConfig:
    """A trace of some steps, in RUN/profile/."""

    first_step: int | None = None
    """First step to trace, as the console numbers them; nothing is traced when not given."""
    num_steps: int = 3
    """Steps to trace."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that trace themselves."""
    shapes: bool = False
    """Record the shapes of what every operation is given."""
    stacks: bool = False
    """Record where in the program every operation was called."""
    memory: bool = False
    """Also record every allocation of GPU memory, and write a snapshot for https://pytorch.org/memory_viz."""

    def __post_init__(self) -> None:
        for name in ("first_step", "num_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"profiling.{name}={value} must be 1 or more")


@dataclass
class Recipe:
    """Sections shared by pre-training and fine-tuning."""

    run: RunConfig = field(default_factory=RunConfig)
    """Run folder and seed."""
    model: ModelConfig = field(default_factory=default_model)
    """Family and shape of the model."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over processes."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Steps, batch, precision."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    """What happens when training goes wrong."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics."""
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    """Traces."""


@dataclass
class PretrainRecipe(Recipe):
    """A pre-training or mid-training run."""

    data: DataConfig = field(default_factory=DataConfig)
    """Indexed datasets."""


@dataclass
class FinetuneRecipe(Recipe):
    """A supervised fine-tuning run."""

    training: SftTrainingConfig = field(default_factory=SftTrainingConfig)
    """Steps or epochs, batch, precision."""
    data: SftDataConfig = field(default_factory=SftDataConfig)
    """Conversations, or prompts and responses."""

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer to fine-tune with: the one named, that of the packed data (PREFIX.tokenizer), or the one kept
        with the checkpoint to start from."""
        if self.data.tokenizer is not None:
            return self.data.tokenizer
        for prefix in self.data.train:
            if (folder := Path(f"{prefix}.tokenizer")).is_dir():
                return folder
        if self.training.init_from is None:
            raise UserError("data.tokenizer is not given, nor training.init_from, whose tokenizer would do: give one")
        return self.training.init_from / "tokenizer"
