"""Functions run by several processes at once, as the ranks of one tensor-parallel group."""

import os
from collections.abc import Callable

import torch
from ports import free_port

from megatron_tpt import platform
from megatron_tpt.config.recipe import ParallelConfig


def _run(rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_PORT=str(port))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    with platform.process_groups(ParallelConfig(tensor_parallel_size=size)):
        platform.seed_everything(0)
        function(rank, size, *arguments)


def on_tensor_parallel_ranks(size: int, function: Callable[..., None], *arguments: object) -> None:
    """Call function(rank, size, *arguments) in `size` processes; fails when any does."""
    torch.multiprocessing.spawn(_run, (size, free_port(), function, arguments), nprocs=size)
