"""The device that a dry run assumes: that of this machine, or one given by name."""

import os
import shutil
import subprocess
from dataclasses import dataclass

from megatron_tpt.errors import UserError

_TIMEOUT_S = 30
# The name that CUDA gives the device, and its memory in MiB as nvidia-smi shows it.
_KNOWN = {
    "a100": ("NVIDIA A100-SXM4-80GB", 81920),
    "a100-40gb": ("NVIDIA A100-SXM4-40GB", 40960),
    "h100": ("NVIDIA H100 80GB HBM3", 81559),
    "h200": ("NVIDIA H200", 143771),
    "b200": ("NVIDIA B200", 183359),
    "gb200": ("NVIDIA GB200", 189471),
}


@dataclass(frozen=True)
class Device:
    """The device of one process."""

    name: str
    memory_bytes: int
    is_gpu: bool = True


def this_cpu() -> Device:
    """The CPU of this machine, whose processes share its memory."""
    return Device("the CPU of this machine", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), is_gpu=False)


def find_device(name: str | None) -> Device:
    """The device of that name; without one the first GPU of this machine, or its CPU. Raises UserError for an unknown
    name."""
    if name == "cpu":
        return this_cpu()
    if name is not None:
        if name not in _KNOWN:
            raise UserError(f"--device={name} is not known: give one of cpu, {', '.join(_KNOWN)}")
        cuda_name, mebibytes = _KNOWN[name]
        return Device(cuda_name, mebibytes << 20)
    return _first_gpu() or this_cpu()


def _first_gpu() -> Device | None:
    """As nvidia-smi reports it, since importing torch takes seconds."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        name, mebibytes = result.stdout.splitlines()[0].rsplit(",", 1)
        return Device(name.strip(), int(mebibytes) << 20)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # no driver, or a device that does not report it
