"""Copies of weights that differ by one bit are found, and their ranks named."""

from pathlib import Path

import pytest
import torch
from training_runs import Train

from megatron_tpt.training.desync import checksums, describe, find_unequal_copies

from megatron.core import fp8_utils

NORM = "decoder.layers.1.pre_mlp_layernorm.weight"
MATRIX = "decoder.layers.0.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    ("name", "overrides"),
    [(MATRIX, []), (NORM, ["--parallel.tensor_parallel_size=2"])],
    ids=["data-parallel", "tensor-parallel"],
)
def test_one_flipped_bit_ends_the_run(name: str, overrides: list[str], train: Train, tmp_path: Path) -> None:
    options = [*overrides, "--faults.desync_interval=3", "--training.num_steps=8"]
    with pytest.raises(AssertionError) as caught:
        train("run", *options, f"--flip=1:6:{name}", num_processes=2, program="flipped_pretrain")
    for rank in (0, 1):  # of two, none is known to be right
        assert f"rank {rank}: Fault('the weights after step 6 are not the same" in str(caught.value)
    assert f"hold a copy: rank 0, 1, 1 parameter ({name})" in str(caught.value)
    assert not (tmp_path / "run/checkpoints/step_00000008").exists()


def test_weights_that_are_gathered_during_the_next_step_are_no_fault(train: Train) -> None:
    overlap = [
        "--parallel.overlap_grad_reduce=true",
        "--parallel.overlap_param_gather=true",
        "--training.dtype=bfloat16",
    ]
    metrics = train("run", *overlap, "--faults.desync_interval=1", "--training.num_steps=4", num_processes=2)
    assert len(metrics) == 4


def test_the_minority_is_named() -> None:
    names, right, wrong = ["a", "b", "c", "d"], [1, 2, 3, 4], [1, 0, 0, 4]
    assert find_unequal_copies(names, [0, 2, 4, 6], [right, right, wrong, right]) == {4: ["b", "c"]}
    assert find_unequal_copies(names, [0, 2], [right, right]) == {}
    assert describe(find_unequal_copies(["a"], [3, 5], [[1], [2]])) == "rank 3, 5, 1 parameter (a)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [8, 5])
def test_any_flipped_bit_changes_the_checksum(rows: int, dtype: torch.dtype) -> None:
    weights = torch.randn(rows, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()]
    for bit in range(8 * weights.element_size() - 1):
        flipped = weights.clone()
        flipped.view(integers)[3, 4] ^= 1 << bit
        assert checksums([flipped])[0] != checksums([weights])[0]
        assert checksums([flipped[1:]])[0] != checksums([weights[1:].clone()])[0]  # wherever it lies in a buffer
    assert checksums([weights[1:]])[0] == checksums([weights[1:].clone()])[0]


class QuantizedTensor(torch.Tensor):
    """A weight in FP8 as Transformer Engine's classes have it: bytes, and scales that give them a value. To torch it is
    a bf16 tensor that has its shape and no memory; whatever is computed of it is computed of the values."""

    @staticmethod
    def __new__(cls, name: str, raw: torch.Tensor, scale: float) -> "QuantizedTensor":
        tensor = torch.Tensor._make_wrapper_subclass(cls, raw.shape, dtype=torch.bfloat16)
        setattr(tensor, name, raw)
        tensor.raw_name, tensor.scale = name, scale
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].raw_name, getattr(args[0], args[0].raw_name), args[0].scale)
        values = [
            (getattr(value, value.raw_name).view(torch.float8_e4m3fn).float() * value.scale).bfloat16()
            if isinstance(value, cls)
            else value
            for value in args
        ]
        return function(*values, **(kwargs or {}))


@pytest.mark.parametrize("name", ["_data", "_rowwise_data"])
def test_weights_kept_in_fp8_are_compared_by_their_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_utils, "HAVE_TE_FP8_TENSOR_CLASS", True)
    monkeypatch.setattr(fp8_utils, "FP8_TENSOR_CLASS", QuantizedTensor)
    values = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn).view(torch.uint8)
    weight, copy = (torch.nn.Parameter(QuantizedTensor(name, raw, 0.5)) for raw in (values, values.clone()))
    assert weight.detach().sum().dtype == torch.bfloat16  # what its bytes represent
    expected = values.view(torch.int64).sum()
    for bit in range(8):
        getattr(copy, name)[3, 4] ^= 1 << bit
        assert checksums([weight])[0] == expected != checksums([copy])[0]
        getattr(copy, name)[3, 4] ^= 1 << bit
    assert checksums([copy])[0] == expected
