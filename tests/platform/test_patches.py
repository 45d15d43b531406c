"""Each adaptation of Megatron Core to the CPU is needed: without it, training, saving or loading fails."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tpt.platform import cpu

PATCHES = sorted(name for name in vars(cpu) if name.startswith("patch_"))


def train_without(patch: str, folder: Path) -> subprocess.CompletedProcess:
    program = str(Path(__file__).with_name("train_without.py"))
    return subprocess.run([sys.executable, program, patch, str(folder)], capture_output=True, text=True)


def test_with_all_patches_a_run_trains_saves_and_loads(tmp_path: Path) -> None:
    result = train_without("nothing", tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("patch", PATCHES)
def test_without_one_patch_it_fails(patch: str, tmp_path: Path) -> None:
    assert train_without(patch, tmp_path).returncode == 1


def test_torch_device_contexts_still_work() -> None:
    """transformers builds models under `with torch.device("meta")`."""
    import torch

    from megatron_tpt import platform  # noqa: F401

    with torch.device("meta"):
        assert torch.zeros(2).device.type == torch.tensor([1.0]).device.type == torch.arange(3).device.type == "meta"
    assert torch.zeros(2).device.type == "cpu"


def test_types_of_torch_stay_types() -> None:
    """transformers names streams in annotations, which are evaluated as it is imported."""
    import torch

    from megatron_tpt import platform  # noqa: F401

    assert torch.cuda.Stream | None
