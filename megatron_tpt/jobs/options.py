"""Options for where the tasks of a job run, and with which resources."""

import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_tpt.config.fields import NonNegativeInt, PositiveInt, check_bounds
from megatron_tpt.errors import UserError


@dataclass(frozen=True)
class ScaleOptions:
    """Options for running one command as many tasks."""

    executor: Literal["local", "slurm", "ray"] = "local"
    """Where tasks run: processes on this machine, a SLURM job array, or a Ray cluster."""
    num_tasks: PositiveInt = 1
    """Number of tasks that the job is split into; fixed until the job is finished."""
    num_workers: PositiveInt | None = None
    """Tasks that run at once. By default as many as the GPUs of this machine allow, or one; unlimited on SLURM and
    Ray."""
    gpus_per_task: NonNegativeInt = 0
    """GPUs of each task, not shared with other tasks. With 0, local tasks see all GPUs."""
    cpus_per_task: PositiveInt | None = None
    """CPU cores that SLURM or Ray reserve for each task; on this machine its OMP_NUM_THREADS, unless that is set."""
    partition: str | None = None
    """SLURM: partition; by default that of the cluster."""
    time_limit: str | None = None
    """SLURM: time limit of a task, as in `04:00:00` or `1-12` (days-hours); by default that of the partition."""
    account: str | None = None
    """SLURM: account to charge."""
    qos: str | None = None
    """SLURM: quality of service."""
    mem: str | None = None
    """SLURM: memory of a task, as in `64G`; by default that of the cluster."""
    sbatch_args: list[str] = field(default_factory=list)
    """SLURM: further sbatch options, as in `constraint=h100` or `exclusive`; they override the ones above."""
    env_command: str | None = None
    """SLURM: shell command before each task, as in `module load cuda`. Tasks use the Python of the submission."""
    max_array_size: PositiveInt | None = None
    """SLURM: most tasks in one array, by default the cluster's MaxArraySize. More tasks are split into several
    arrays."""
    requeue_before_limit_s: PositiveInt = 120
    """SLURM: seconds before the time limit at which a task that is still running is stopped and requeued."""
    max_requeues: NonNegativeInt = 100
    """SLURM: number of times that a task may be requeued before it fails."""
    wait: bool = False
    """SLURM: wait for the tasks to end and report their results, instead of exiting once they are submitted."""
    ray_address: str | None = None
    """Ray: address of the cluster, as in `auto` or `ray://head:10001`; by default RAY_ADDRESS, else this machine."""

    @property
    def is_split(self) -> bool:
        """Whether the job runs as separate tasks, and not within the process of the command."""
        return self.num_tasks > 1 or self.executor != "local"

    def __post_init__(self) -> None:
        check_bounds(self)
        for argument in self.sbatch_args:
            if not re.fullmatch(r"[a-z][a-z0-9-]*(=.+)?", argument):
                raise UserError(f"sbatch argument {argument!r}: write name=value without dashes, as in constraint=h100")
