"""Translates the variables of srun and mpirun to those of torchrun.

The processes of one run find each other by torchrun's variables (RANK, WORLD_SIZE, ...). Those of other launchers are
used if they are complete. If they are not, the run is refused: otherwise every process would train alone.
"""

import dataclasses
import logging
import os
import re
import signal
import zlib
from collections.abc import Mapping, MutableMapping

from megatron_tpt.errors import UserError
from megatron_tpt.processes import end_with_parent

logger = logging.getLogger(__name__)

_PORTS = range(20000, 30000)


@dataclasses.dataclass(frozen=True)
class _Launch:
    """This process according to a launcher's variables."""

    launcher: str
    rank: str | None
    world_size: str
    local_rank: str | None
    first_host: str | None
    """None when it is not known."""
    name: str | None
    """Equal for all processes of a run, different for different runs; None when the launcher has no such name."""


def _of_mpirun(environment: Mapping[str, str]) -> _Launch | None:
    """Open MPI's mpirun."""
    get = environment.get
    if (size := get("OMPI_COMM_WORLD_SIZE")) is None:
        return None
    host = "127.0.0.1" if get("OMPI_COMM_WORLD_LOCAL_SIZE") == size else None
    name = get("PMIX_NAMESPACE") or get("OMPI_MCA_ess_base_jobid")
    return _Launch("mpirun", get("OMPI_COMM_WORLD_RANK"), size, get("OMPI_COMM_WORLD_LOCAL_RANK"), host, name)


def _of_mpiexec(environment: Mapping[str, str]) -> _Launch | None:
    """MPICH's and Intel MPI's mpiexec. (srun --mpi=pmi2 sets PMI_... too, but its own variables are more complete.)"""
    get = environment.get
    if (size := get("PMI_SIZE")) is None or get("SLURM_STEP_NUM_TASKS") == size:
        return None
    host = "127.0.0.1" if get("MPI_LOCALNRANKS") == size else None
    return _Launch("mpiexec", get("PMI_RANK"), size, get("MPI_LOCALRANKID"), host, None)


def _of_srun(environment: Mapping[str, str]) -> _Launch | None:
    """srun. Batch scripts and salloc shells have some of its variables too, but are not steps of the job."""
    get = environment.get
    rank, step = get("SLURM_PROCID"), get("SLURM_STEP_ID")
    size = get("SLURM_STEP_NUM_TASKS") or get("SLURM_NTASKS")
    if rank is None or size is None or (step is None and "SLURM_JOB_ID" in environment and rank == "0"):
        return None
    nodes = get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST")
    name = f"{get('SLURM_JOB_ID')}.{step}.{get('SLURM_RESTART_COUNT', '0')}" if step is not None else None
    return _Launch("srun", rank, size, get("SLURM_LOCALID"), first_host(nodes) if nodes else None, name)


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: `rack1n03` of `rack[1-2]n[03,07-09],other`."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found.group()) if found else nodes


def end_with_torchrun() -> None:
    """Have the kernel kill this process when torchrun, if that started it, is gone.

    torchrun ends its processes when it can; killed itself, for lack of memory or by hand, it would leave them training,
    with the GPUs and the run folder. Processes of srun are ended by SLURM; one that a shell started may outlive it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGKILL)


def join_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables from those of srun or mpirun, if one of these started this process as one of several.

    Raises UserError with the command to use when some of the variables are missing.
    """
    if "RANK" in environment:
        if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]:
            raise UserError(f"RANK is set without {', '.join(missing)}: set all of them, or start with torchrun")
        return
    launch = _of_mpirun(environment) or _of_mpiexec(environment) or _of_srun(environment)
    if launch is None or launch.world_size == "1":
        _check_single(environment)
        return
    port = None if launch.name is None else str(_PORTS[zlib.crc32(launch.name.encode()) % len(_PORTS)])
    values = {
        "RANK": launch.rank,
        "WORLD_SIZE": launch.world_size,
        "LOCAL_RANK": launch.local_rank,
        "MASTER_ADDR": environment.get("MASTER_ADDR") or launch.first_host,
        "MASTER_PORT": environment.get("MASTER_PORT") or port,
    }
    complete = {name: value for name, value in values.items() if value is not None}
    if missing := [name for name in values if name not in complete]:
        raise UserError(
            f"{launch.launcher} has started this process as one of {launch.world_size}, and its variables do not say "
            f"{', '.join(missing)}: set them for every process, or start with torchrun --nproc-per-node "
            f"{launch.world_size} -m megatron_tpt.pretrain RECIPE.yaml"
        )
    environment.update(complete)


def _check_single(environment: Mapping[str, str]) -> None:
    """Refuse a process that looks like one of several; warn if a SLURM job of several tasks uses only this process."""
    if environment.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} is set without RANK: set RANK, LOCAL_RANK, MASTER_ADDR and "
            f"MASTER_PORT for every process, or start with torchrun"
        )
    num_tasks = environment.get("SLURM_NTASKS", "1")
    if num_tasks != "1":
        logger.warning(
            f"this SLURM job has {num_tasks} tasks, but training uses only this process: start it with srun, "
            f"as slurm/train.sbatch does, to use all of them"
        )
