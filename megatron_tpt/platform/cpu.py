"""Megatron Core on a CPU.

Megatron Core 0.19 is written for CUDA: it asks for the device "cuda" by name, tells tensors apart by their CUDA type
names, and keeps CUDA's random state. `adapt_megatron_to_cpu` answers each of these in the place named beside it, and
nothing else. It is called where torch has no CUDA device, never otherwise.

Line numbers are those of megatron-core 0.19.2.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._device

_adapted = False


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that makes on the CPU what is asked for on "cuda"."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


class _NoStream:
    """A CUDA stream where everything is done at once: waiting for it is over before it begins."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> "_NoEvent":
        return _NoEvent()

    def synchronize(self) -> None: ...


class _NoEvent:
    """A CUDA event that has happened."""

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for CUDA calls that have no meaning on a CPU."""


def patch_tensor_factories() -> None:
    """Factories with device="cuda".

    optimizer/clip_grads.py:96 and :108, optimizer/optimizer.py:690, pipeline_parallel/schedules.py:749 and :2292,
    transformer/utils.py:39, dist_checkpointing/exchange_utils.py:109.
    """
    # `with torch.device(...)` looks a factory's original up in a set that torch fills at its first use: fill it now.
    # Otherwise transformers, for one, loads models with parts of them left uninitialised.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def patch_tensor_moves() -> None:
    """`.cuda()` on tensors: the checkpoint's exchange of what each rank has (dist_checkpointing/exchange_utils.py:339)
    and tied embeddings (models/common/language_module/language_module.py:307)."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def patch_tensor_type_names() -> None:
    """Parameters and gradients are told apart by CUDA type names: optimizer/distrib_optimizer.py:401 and :466,
    optimizer/optimizer.py:1009 and :1028, optimizer/clip_grads.py:174; the classes: transformer/module.py:20.
    """
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor"):
        setattr(torch.cuda, name, getattr(torch, name))


def patch_device_calls() -> None:
    """The current device and stream: optimizer/distrib_optimizer.py, distributed/param_and_grad_buffer.py,
    pipeline_parallel/p2p_communication.py, pipeline_parallel/schedules.py."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = _nothing
    torch.cuda.current_stream = _NoStream  # type: ignore[assignment, misc]


def patch_fsdp() -> None:
    """Megatron FSDP works on streams of its own (distributed/fsdp/src/megatron_fsdp/megatron_fsdp.py:406,
    param_and_grad_buffer.py:3969) and over a mesh of CUDA devices (distributed/fsdp/mcore_fsdp_adapter.py:437)."""
    from torch.distributed.device_mesh import DeviceMesh

    torch.cuda.Stream = _NoStream  # type: ignore[assignment, misc]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment, misc]
    from_group = DeviceMesh.from_group

    def from_group_on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return from_group(group, "cpu" if _is_cuda(device_type) else device_type, *args, **kwargs)

    DeviceMesh.from_group = from_group_on_cpu  # type: ignore[method-assign, assignment]


@contextlib.contextmanager
def fsdp_construction_on_cpu() -> Iterator[None]:
    """While Megatron FSDP is built, the current device has a number: it compares its device with f"cuda:{number}"
    (megatron_fsdp.py:234), and warns that they differ, as they should here."""
    log = logging.getLogger("megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp")
    current_device, level = torch.cuda.current_device, log.level
    torch.cuda.current_device = lambda: 0
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        torch.cuda.current_device = current_device
        log.setLevel(level)


def patch_random_state() -> None:
    """CUDA's random state becomes the CPU's: tensor_parallel/random.py:104-175 and :303-308; :446 seeds it."""
    from megatron.core.tensor_parallel import random

    torch.cuda.manual_seed = torch.random.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()  # type: ignore[misc]
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def patch_jit() -> None:
    """`jit_fuser` is torch.compile (jit.py:19): minutes of C++ compilation that a CPU run does not gain from.

    Must come before any other module of Megatron Core is imported: the decorator is applied as they are read.
    """
    from megatron.core import jit

    jit.disable_jit_fuser()


def adapt_megatron_to_cpu() -> None:
    """Make Megatron Core run on the CPU with gloo. Call before any other import of it; twice does nothing."""
    global _adapted
    if _adapted:
        return
    patch_jit()
    patch_tensor_factories()
    patch_tensor_moves()
    patch_tensor_type_names()
    patch_device_calls()
    patch_fsdp()
    patch_random_state()
    _adapted = True
