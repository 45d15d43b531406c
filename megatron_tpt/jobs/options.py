"""Where the tasks of a job run, and with what."""

import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_tpt.config.fields import NonNegativeInt, PositiveInt, check_bounds
from megatron_tpt.errors import UserError


@dataclass(frozen=True)
class ScaleOptions:
    """How one command runs as many tasks."""

    executor: Literal["local", "slurm", "ray"] = "local"
    """Where tasks run: processes on this machine, a SLURM job array, or a Ray cluster."""
    num_tasks: PositiveInt = 1
    """Parts that the job is split into. An unfinished job keeps its number."""
    num_workers: PositiveInt | None = None
    """Tasks at once. On this machine: as many as its GPUs allow, one without; on SLURM and Ray: no limit of ours."""
    gpus_per_task: NonNegativeInt = 0
    """GPUs of each task, for it alone. At 0 a local task sees all of them."""
    cpus_per_task: PositiveInt | None = None
    """CPU cores that SLURM or Ray reserve for each task; on this machine its OMP_NUM_THREADS, where that is not set."""
    partition: str | None = None
    """SLURM: partition; by default the cluster's own."""
    time_limit: str | None = None
    """SLURM: time limit of a task, as in `04:00:00` or `1-12` (days-hours); by default the partition's own."""
    account: str | None = None
    """SLURM: account that pays."""
    qos: str | None = None
    """SLURM: quality of service."""
    mem: str | None = None
    """SLURM: memory of a task, as in `64G`; by default the cluster's own."""
    sbatch_args: list[str] = field(default_factory=list)
    """SLURM: further sbatch options, as in `constraint=h100` or `exclusive`; they win over the ones above."""
    env_command: str | None = None
    """SLURM: shell line before each task, as in `module load cuda`. The task runs with the Python of the submission."""
    max_array_size: PositiveInt | None = None
    """SLURM: most tasks in one array, by default the cluster's MaxArraySize. More tasks are more arrays."""
    requeue_before_limit_s: PositiveInt = 120
    """SLURM: a task that is still running this long before its time limit is stopped and queued again."""
    max_requeues: NonNegativeInt = 100
    """SLURM: times that one task may be queued again; after that it fails."""
    wait: bool = False
    """SLURM: wait for the end of the tasks and report as elsewhere, instead of ending once they are submitted."""
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
