"""The accelerator and the process groups: CUDA with NCCL, or the CPU with gloo.

Importing this package makes Megatron Core usable on a machine without CUDA; with CUDA it changes nothing. All other
packages import it before Megatron Core; megatron_core.py holds all code that depends on Megatron Core's version. May
import config and the single modules.
"""

import contextlib
import datetime
import math
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.platform.megatron_core import (
    adapt_megatron_to_cpu,
    fsdp_construction_on_cpu,
    patch_jit,
    require_version,
)
from megatron_tpt.platform.noise import silence_known_messages

# Checkpoints are untrusted: torch.load only builds tensors and plain containers, even if a library asks for more.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
_on_cpu = not torch.cuda.is_available()
silence_known_messages(on_cpu=_on_cpu)
if _on_cpu:
    patch_jit()
require_version()
if _on_cpu:
    adapt_megatron_to_cpu()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402  (after the adaptation)


def device() -> torch.device:
    """The device of this process: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def world_size_from_environment() -> int:
    """The number of processes that torchrun or another launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def process_groups(parallel: ParallelConfig, *, timeout_s: int = 600) -> Iterator[None]:
    """Join the processes that torchrun started into tensor-, pipeline- and data-parallel groups, for one `with` block.

    Also works as a single process without torchrun. Raises UserError when the layout does not divide the world.
    """
    parallel.data_parallel_size(world_size_from_environment())  # refuses a layout that does not fit
    timeout = datetime.timedelta(seconds=timeout_s)
    if torch.cuda.is_available():
        # With one hardware queue, communication and compute kernels run in the order in which Megatron Core launches
        # them; its FSDP needs them to run concurrently.
        if parallel.fsdp == "none":
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        # Record the last NCCL calls, to diagnose hangs (training/watchdog.py).
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend, timeout=timeout)
    else:
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel(
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            virtual_pipeline_model_parallel_size=_virtual_size(parallel),
            context_parallel_size=parallel.context_parallel_size,
            order=parallel.rank_order,
            distributed_timeout_minutes=math.ceil(timeout_s / 60),
            create_gloo_process_groups=True,
        )
        torch.distributed.barrier()  # what one rank of a machine did before is done before any rank continues
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _virtual_size(parallel: ParallelConfig) -> int | None:
    """In Megatron Core's convention: None for the schedule without interleaving."""
    return parallel.virtual_pipeline_parallel_size if parallel.virtual_pipeline_parallel_size > 1 else None


def gather_objects[T](value: T) -> list[T]:
    """The value of every rank, in the order of the ranks. All ranks call it; values are pickled."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_first_rank[T](make: Callable[[], T]) -> T:
    """What `make` returns on the first rank, where alone it is called. All ranks call this; the value is pickled."""
    values: list[Any] = [make() if is_first_rank() else None]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def set_timeout(timeout_s: int) -> None:
    """Set the timeout of the collectives of all process groups."""
    parallel_state.update_pg_timeout(datetime.timedelta(seconds=timeout_s))


def seed_everything(seed: int) -> None:
    """Seed torch and Megatron Core's tensor-parallel random streams. Needs process groups.

    Pipeline stages and data-parallel ranks get different streams, so that their dropout differs.
    """
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    place = 100 * parallel_state.get_pipeline_model_parallel_rank() + 10 * data_rank
    torch.manual_seed(seed + place)
    tensor_parallel.model_parallel_cuda_manual_seed(seed + place)


def fsdp_construction() -> contextlib.AbstractContextManager[None]:
    """The context in which Megatron FSDP is built on this machine."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    return fsdp_construction_on_cpu()


def is_first_rank() -> bool:
    """Whether this process is global rank 0, which reports."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def rank_name() -> str:
    """Identifies this process in messages: its rank, its GPU and its machine."""
    gpu = f"GPU {torch.cuda.current_device()} of " if torch.cuda.is_available() else ""
    return f"{torch.distributed.get_rank()} ({gpu}{socket.gethostname()})"
