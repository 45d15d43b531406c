"""The comparisons for a GPU, of a CPU's kernels with plain torch; and their steps with toy shapes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import training as bench
from benchmarks.gpu.comparisons import KERNELS
from benchmarks.gpu.figures import run_limited
from benchmarks.gpu.kernels import Kernel, all_kernels, compare, too_far
from benchmarks.gpu.record import Record, failures, read
from megatron_tpt import platform

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree_with_plain_torch_in_value_and_gradients(dtype: torch.dtype, tmp_path: Path) -> None:
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    recipe = bench.recipe_of(bench.TINY, {"sequence_length": 48, "dtype": name}, tmp_path, None)
    with platform.process_groups(recipe.parallel):
        platform.seed_everything(1)
        kernels = all_kernels(recipe, torch.device("cpu"), 48)
        assert kernels.keys() == set(KERNELS)
        for kernel in kernels.values():
            errors = compare(kernel, dtype)
            assert errors.keys() == {"output", *kernel.inputs} and too_far(errors, dtype) == [], errors


def test_a_wrong_gradient_and_one_that_is_no_number_are_seen() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, t: torch.Tensor) -> torch.Tensor:
            return t * 2

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2.2

    inputs = {"t": torch.randn(8, 8)}
    errors = compare(Kernel(Wrong.apply, lambda t: t * 2, inputs), torch.float32)
    assert too_far(errors, torch.float32) == ["t"] and errors["t"] == pytest.approx(0.1, rel=1e-3)
    errors = compare(Kernel(lambda t: t * float("nan"), lambda t: t * 2, inputs), torch.float32)
    assert too_far(errors, torch.float32) == ["output", "t"]


def test_a_part_is_measured_once_unless_it_failed(tmp_path: Path) -> None:
    record, calls = Record(tmp_path / "gpu.json", "step"), []

    def measure() -> int:
        calls.append(1)
        return 1 // (len(calls) - 1)

    record.once("part", measure)
    assert failures(read(record.path)["step"]) == ["part"]
    assert record.once("part", measure) == 1 == record.once("part", measure)
    assert len(calls) == 2 and read(record.path) == {"step": {"part": 1}}


def test_a_step_that_is_ended_leaves_no_process(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # The reader sees the end of the pipe when nobody has it open for writing: neither the step nor what it started.
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    program = f"exec 3> {pipe}; echo begun >&3; sleep 1000 & wait"
    assert run_limited(["bash", "-c", program], limit_s=3) is None
    os.set_blocking(reader, True)
    with os.fdopen(reader) as file:
        assert file.read() == "begun\n"
    assert run_limited(["bash", "-c", "exit 3"], limit_s=60) == 3


@pytest.mark.example(minutes=5)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the toy shapes are for a CPU")
def test_every_step_passes_dry_and_is_not_repeated(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = ["bash", str(ROOT / "benchmarks/gpu_figures.sh"), "--dry", "--output", str(output)]
    for expected in ("all done", "done before"):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CARRIED": "/nowhere"})
        assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr
    figures = json.loads(output.read_text())
    assert len(figures) == 10
    for name in ("bf16", "mlp recomputed", "all recomputed"):
        memory = figures["memory"][name]
        assert memory["tensors_gib"] == pytest.approx(memory["tensors_computed_gib"], rel=0.01)
    assert figures["options"]["plain"]["losses"] == figures["options"]["all recomputed"]["losses"]
    for direction in ("from a CPU", "to a CPU"):
        assert figures["checkpoints"][direction]["largest_relative_difference"] == 0.0
