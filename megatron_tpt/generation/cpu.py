"""Engines on a CPU: the number format that its instructions are fast in, and as many threads as it has cores.

Without instructions for bfloat16 a processor converts every weight it multiplies by: a model of 135M parameters is half
as fast in it as in float32 (AVX2, two cores, 8 sequences: 29 against 58 tokens/s). One thread on two cores halves the
speed again, and two threads on the two logical processors of one core only wait for each other.
"""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_tpt.generation.api import EngineOptions
from megatron_tpt.generation.models import load_model_config

logger = logging.getLogger(__name__)

THREADS_VARIABLE = "OMP_NUM_THREADS"
"""The environment variable by which users choose the threads themselves."""
_INSTRUCTIONS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16", "svebf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
"""What /proc/cpuinfo calls those that multiply numbers of a format, on x86 and on ARM."""
_CPU_INFO = Path("/proc/cpuinfo")
_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def dtype_name(options: EngineOptions, *, on_cpu: bool) -> str:
    """The dtype to ask an engine for, "auto" where it is that of the model's config.json.

    vLLM's own "auto" turns float32 models into half precision. On a CPU without instructions for the model's format
    the answer is float32, in which the same weights are the same numbers.
    """
    if options.dtype != "auto":
        return options.dtype
    stored = stored_dtype(options.model)
    if stored == "float32" or (on_cpu and not _has_instructions(stored or "bfloat16")):
        return "float32"
    return "auto"


def stored_dtype(model: str) -> str | None:
    """The dtype in a model's config.json, such as "bfloat16"; None where there is none."""
    stored = getattr(load_model_config(model), "dtype", None)
    return None if stored is None else str(stored).removeprefix("torch.")


def num_threads(num_processes: int = 1) -> int:
    """Threads for each of several processes that compute on this machine: what the user has set, or a share of the
    cores that this process may use."""
    chosen = os.environ.get(THREADS_VARIABLE, "").partition(",")[0]  # one number for each level of nesting
    return int(chosen) if chosen.isdigit() and int(chosen) > 0 else max(1, num_cores() // num_processes)


@contextlib.contextmanager
def computing_threads(options: EngineOptions, dtype: str, num_processes: int = 1) -> Iterator[None]:
    """Start an engine in the block whose processes, this one or children of it, compute with `num_threads` each.

    A trainer in this process keeps the threads that it has. After vLLM has started, it allows no change. `dtype` is
    that of `dtype_name`.
    """
    import torch
    import torch.distributed

    if torch.distributed.is_initialized():
        note_choice(options, dtype, torch.get_num_threads(), "those of this process")
        yield
        return
    threads, before = num_threads(num_processes), os.environ.get(THREADS_VARIABLE)
    note_choice(options, dtype, threads, THREADS_VARIABLE if before else f"one per core, or {THREADS_VARIABLE}")
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    os.environ[THREADS_VARIABLE] = str(threads)  # for children
    try:
        yield
    finally:
        del os.environ[THREADS_VARIABLE]
        if before is not None:
            os.environ[THREADS_VARIABLE] = before


def note_choice(options: EngineOptions, dtype: str, threads: int, whose: str) -> None:
    """Log what an engine on the CPU computes in, and with how many threads, and why."""
    stored = stored_dtype(options.model)
    name = stored or "half precision" if dtype == "auto" else dtype
    why = ""
    if dtype != "auto" and dtype not in (options.dtype, stored):
        why = f" in place of {stored or 'half precision'}, for which this processor has no instructions"
    logger.info(f"on the CPU: {name}{why}; threads: {threads} ({whose})")


def num_cores() -> int:
    """Physical cores that this process may use: those of its processors, at most what its cgroup is given."""
    processors = os.sched_getaffinity(0)
    cores = {_siblings(number) for number in processors}
    return max(1, min(len(cores), math.floor(_quota() or len(cores))))


def _siblings(processor: int) -> str:
    """Which logical processors share the core of one; without Linux's files, it is alone."""
    with contextlib.suppress(OSError):
        return (_TOPOLOGY / f"cpu{processor}/topology/thread_siblings_list").read_text().strip()
    return str(processor)


def _quota() -> float | None:
    """Processors that this cgroup (version 2, else 1) may use at once; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        whole, part = (int((_CGROUP / f"cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return None if whole <= 0 else whole / part
    return None


def _has_instructions(dtype: str) -> bool:
    """Whether this processor has instructions for a format; where it does not say, the engine's choice stands."""
    flags = _flags()
    return flags is None or dtype not in _INSTRUCTIONS or bool(flags & _INSTRUCTIONS[dtype])


def _flags() -> set[str] | None:
    """The abilities of the processor; None where Linux's file is missing or has none."""
    with contextlib.suppress(OSError):
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.partition(":")[2].split())
    return None
