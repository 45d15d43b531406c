"""The sections of a recipe on the run itself: its folder, checkpoints, faults, reports."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from megatron_tpt.config.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check_bounds
from megatron_tpt.config.on_change import Effect, on_change
from megatron_tpt.errors import require


@on_change(
    {
        (Effect.REFUSED, Effect.FREE): "seed",
        (Effect.FREE, Effect.FREE): """
            output_dir threads_per_process distributed_timeout_s time_limit_min time_limit_margin_min
            first_step_timeout_s hang_timeout_s
        """,
    }
)
@dataclass
class RunConfig:
    """Where a run lives and what makes it reproducible."""

    output_dir: Path = Path("runs/default")
    """The run folder: run.yaml, checkpoints/, tensorboard/, metrics.jsonl. The same folder again resumes the run."""
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 1234
    """Decides the initial weights, the data order and dropout."""
    threads_per_process: PositiveInt | None = None
    """CPU threads of each process; torch's choice (OMP_NUM_THREADS) when not given. Losses are the same to the bit only
    for the same number."""
    distributed_timeout_s: PositiveInt = 600
    """A collective that waits longer for another rank fails."""
    time_limit_min: NonNegativeFloat | None = None
    """Minutes from the start after which the program must have stopped; the end of the SLURM job when not given."""
    time_limit_margin_min: NonNegativeFloat = 5.0
    """Minutes before that limit to stop with a checkpoint (exit code 75: the same command resumes), but at most a tenth
    of the time that there was."""
    first_step_timeout_s: PositiveInt = 1800
    """The same until the first step is done: loading, opening data and choosing kernels take ranks unequally long."""
    hang_timeout_s: NonNegativeFloat | None = None
    """When a rank takes no micro-batch and ends no step for this long, the rank that the others wait for is named, the
    stacks of all go to RUN/logs/, and the run ends with code 1. Half of distributed_timeout_s when not given; 0: never.
    A checkpoint and the rollouts of an iteration may take as long as the first step."""

    def __post_init__(self) -> None:
        check_bounds(self, "run.")
        require(
            self.distributed_timeout_s <= self.first_step_timeout_s,
            f"run.distributed_timeout_s={self.distributed_timeout_s} must be at most run.first_step_timeout_s="
            f"{self.first_step_timeout_s}: raise that or lower it",
        )
        require(
            self.hang_timeout_s is None or self.hang_timeout_s < self.distributed_timeout_s,
            f"run.hang_timeout_s={self.hang_timeout_s} must lie below run.distributed_timeout_s="
            f"{self.distributed_timeout_s}, or collectives fail before it is known why: lower it or raise that",
        )

    @property
    def resolved_hang_timeout_s(self) -> float:
        """The time after which a run counts as hung; infinite for never."""
        if self.hang_timeout_s is None:
            return self.distributed_timeout_s / 2
        return self.hang_timeout_s or float("inf")


@on_change(
    {
        (Effect.FREE, Effect.FREE): """
            save_interval keep_last keep_every asynchronous optimizer_sharding verify
        """,
    }
)
@dataclass
class CheckpointConfig:
    """What is kept to resume from."""

    save_interval: NonNegativeInt = 0
    """Steps between checkpoints; the last step is always saved, 0 saves nothing else."""
    keep_last: PositiveInt | None = None
    """Older checkpoints are deleted when there are more than this; all are kept when not given."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that this divides are never deleted."""
    asynchronous: bool = False
    """Write checkpoints in the background: training continues after a copy of weights and optimizer to host memory:
    there must be room for it. The last checkpoint of a run, or before a stop, is waited for."""
    optimizer_sharding: Literal["fully_reshardable", "dp_reshardable"] = "fully_reshardable"
    """Form of the distributed optimizer's state. The first resumes under any layout, but every rank gathers all that
    its data-parallel group has into its machine's memory, 12 bytes for each of the parameters that a rank computes
    with; the second is written as the ranks have it, which large models need, and resumes only under the same tensor-
    and pipeline-parallel sizes, at any data-parallel size."""
    verify: bool = True
    """Compare the content of a checkpoint with its checksums before resuming from it; without, only the sizes of its
    files. A damaged one is set aside, and the run resumes from the one before."""

    def __post_init__(self) -> None:
        check_bounds(self, "checkpoint.")


@on_change(
    {
        (Effect.FREE, Effect.FREE): """
            on_nonfinite on_loss_spike loss_spike_factor loss_spike_window max_skips max_rollbacks
            desync_interval rerun
        """,
    }
)
@dataclass
class FaultsConfig:
    """What happens when training goes wrong."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """When the loss or a gradient is not finite: stop with a diagnosis, skip the update of that batch, or return to
    the last checkpoint and skip the data of the steps since."""
    on_loss_spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    """The same for a loss above loss_spike_factor times the median loss of the last loss_spike_window good steps."""
    loss_spike_factor: Annotated[float, Gt(1)] = 2.0
    """A loss is a spike above this many times the usual one."""
    loss_spike_window: Annotated[int, Ge(2)] = 50
    """Number of good steps whose median is the usual loss."""
    max_skips: NonNegativeInt = 10
    """Batches skipped in a row before the run stops."""
    max_rollbacks: NonNegativeInt = 3
    """Times that a run returns to a checkpoint before it stops."""
    desync_interval: NonNegativeInt = 100
    """Steps between comparisons of the weights of all ranks that hold a copy of them, by checksums; where they differ
    the run ends with code 1 and names the ranks. 0: never."""
    rerun: Literal["off", "diagnose", "recover"] = "diagnose"
    """Recompute a bad step on the same batch, and say whether the result was the same (the data or the
    software) or another (the hardware of a rank); with recover a second result that is good is used, and training
    continues. Not under training.fp8=delayed, whose scales the first computation has changed."""

    def __post_init__(self) -> None:
        check_bounds(self, "faults.")


@on_change(
    {
        (Effect.FREE, Effect.FREE): """
            log_interval tensorboard peak_tflops straggler_factor wandb_project trackio_project prometheus_folder
        """,
    }
)
@dataclass
class LoggingConfig:
    """What is reported and how often."""

    log_interval: PositiveInt = 10
    """Steps between lines on the console, in metrics.jsonl and in TensorBoard; the values are means over them."""
    tensorboard: bool = True
    """Write TensorBoard event files: metrics with charts for them (Custom Scalars), the recipe as text and as
    hyper-parameters (HParams)."""
    peak_tflops: PositiveFloat | None = None
    """Dense peak of one accelerator in TFLOP/s, of which MFU is a part; from a table of NVIDIA's A100, H100, H200 and
    B200 when not given. There is no MFU on devices that are not in it."""
    straggler_factor: Annotated[float, Gt(1)] = 1.5
    """Name the ranks that take more than this many times as long as the median rank for data, forward and backward."""
    wandb_project: str | None = None
    """Also report to this project of Weights & Biases (package wandb; its key is read from its own settings)."""
    trackio_project: str | None = None
    """Also report to this project of trackio (package trackio), whose page `trackio show` opens."""
    prometheus_folder: Path | None = None
    """Also keep the last report as a file in this folder, that of the textfile collector of Prometheus' node_exporter
    on the first rank's machine."""

    def __post_init__(self) -> None:
        check_bounds(self, "logging.")


@on_change({(Effect.FREE, Effect.FREE): "first_step num_steps ranks shapes stacks memory"})
@dataclass
class ProfilingConfig:
    """A trace of some steps, in RUN/profile/."""

    first_step: PositiveInt | None = None
    """First step to trace, as the console numbers them; nothing is traced when not given."""
    num_steps: PositiveInt = 3
    """Steps to trace."""
    ranks: list[NonNegativeInt] = field(default_factory=lambda: [0])
    """Ranks that trace themselves."""
    shapes: bool = False
    """Record the shapes of what every operation is given."""
    stacks: bool = False
    """Record where in the program every operation was called."""
    memory: bool = False
    """Also record every allocation of GPU memory, and write a snapshot for https://pytorch.org/memory_viz."""

    def __post_init__(self) -> None:
        check_bounds(self, "profiling.")
