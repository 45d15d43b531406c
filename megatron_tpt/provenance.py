"""What a figure or a run comes from: the revision of this package, the packages installed, the machine, the job."""

import functools
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import megatron_tpt

STARTS = "starts.jsonl"
"""The log of the starts of a training run, in its folder (training/starts.py)."""
_VARIABLES = ("CUDA_", "GLOO_", "MEGATRON_TPT_", "NCCL_", "NVTE_", "OMP_", "PYTORCH_", "SLURM_", "TORCH_", "VLLM_")
_SECRETS = ("CREDENTIAL", "JWT", "KEY", "PASSWORD", "SECRET", "TOKEN")


def versions(*names: str) -> dict[str, str]:
    """The versions of those of these distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def all_versions() -> dict[str, str]:
    """The versions of all distributions that are installed, by name."""
    found = {str(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(found, key=str.lower)}


def described_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables of SLURM, CUDA, NCCL, torch and vLLM, which change what a run does; none whose name is
    that of a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(_VARIABLES) and not any(word in name for word in _SECRETS)
    }


def start_record() -> dict[str, Any]:
    """This process's start, for a log of starts: when, where, by which command, with which packages and variables."""
    return environment() | {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "command": sys.orig_argv,
        "packages": all_versions(),
        "variables": described_variables(),
    }


@functools.cache
def environment() -> dict[str, Any]:
    """The machine, Python and this package."""
    return {
        "package": versions("megatron-tpt") | {"git_revision": git_revision()},
        "python": platform.python_version(),
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "gpus": _gpus(),
        },
    }


def git_revision() -> str | None:
    """The commit of the checkout that this package is in, with "+changes" where files differ; None without one."""
    folder = Path(megatron_tpt.__file__).parent
    if not (folder.parent / ".git").exists():  # else it might be another repository's
        return None
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit


def _gpus() -> list[str]:
    listed = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return listed.splitlines() if listed else []


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
