"""This machine as if it had an H100, for what is built and described there without a kernel being run.

torch's questions about the device are answered as an H100 would; tensors that libraries ask for on "cuda" are made on
the CPU, or on `meta`, where they have a shape alone. Process groups are torch's fake ones: one process is any rank of
any number, and nothing is sent; a run of one rank has gloo's, by which checkpoints are written and read. Import this
module before Megatron Core.
"""

import contextlib
import unittest.mock
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_tpt import platform
from megatron_tpt.config.parallel import ParallelConfig

NAME = "NVIDIA H100 80GB HBM3"
PROPERTIES = SimpleNamespace(
    name=NAME, major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, uuid="", warp_size=32
)
torch.cuda.IntTensor = torch.IntTensor  # type: ignore[misc]


@contextlib.contextmanager
def h100(tensors_on: str = "cpu") -> Iterator[None]:
    """Inside, torch says that there is an H100, and what is made "on the current device" is on `tensors_on`."""
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: torch.device(tensors_on),
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: PROPERTIES,
        "is_bf16_supported": lambda including_emulation=True: True,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(unittest.mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(unittest.mock.patch.object(platform, "device", lambda: torch.device(tensors_on)))
        yield


@contextlib.contextmanager
def rank_of(parallel: ParallelConfig, rank: int, num_ranks: int) -> Iterator[None]:
    """The package's process groups, as that rank of a run of `num_ranks` has them."""
    init, new_group = torch.distributed.init_process_group, torch.distributed.new_group
    stand_in, store = ("gloo", torch.distributed.HashStore()) if num_ranks == 1 else ("fake", FakeStore())

    def fake_init(backend: str, **_: Any) -> None:
        assert backend == "nccl"
        init(stand_in, store=store, rank=rank, world_size=num_ranks)

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": stand_in, "pg_options": None})

    variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(num_ranks)}
    with (
        unittest.mock.patch.dict("os.environ", variables),
        unittest.mock.patch.object(torch.distributed, "init_process_group", fake_init),
        unittest.mock.patch.object(torch.distributed, "new_group", fake_group),
        platform.process_groups(parallel),
    ):
        platform.seed_everything(1)
        yield
