"""Functions run by several processes at once, as the ranks of one tensor-parallel group."""

import os
from collections.abc import Callable

import torch
from ports import free_port

from megatron_tpt import platform
from megatron_tpt.config.parallel import ParallelConfig


def _run_rank(rank: int, size: int, port: int, function: Callable[[int, int], None]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_PORT=str(port))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    _run(rank, size, function)


def _run(rank: int, size: int, function: Callable[[int, int], None]) -> None:
    with platform.process_groups(ParallelConfig(tensor_parallel_size=size)):
        platform.seed_everything(0)
        function(rank, size)


def on_tensor_parallel_ranks(size: int, function: Callable[[int, int], None]) -> None:
    """Call function(rank, size) in `size` processes, in this one where it is one; fails when any does."""
    if size == 1:
        _run(0, 1, function)
    else:
        torch.multiprocessing.spawn(_run_rank, (size, free_port(), function), nprocs=size)
