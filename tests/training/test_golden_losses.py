"""Losses of runs as they were when they were written down: a change that should change nothing changes no bit of them.

    GOLDEN=write pytest tests/training/test_golden_losses.py    writes them again

Every file says on which processor and with which torch it was made. Elsewhere sums are rounded otherwise: there the
losses are compared to three digits: Muon's iterations make more of it than a sum does.
"""

import os
from pathlib import Path

import pytest
import torch
from training_runs import FINETUNE, PRETRAIN, Train

GOLDEN = Path(__file__).parent / "golden"
_MUON = {"name": "muon", "learning_rate": 1e-2, "adam_learning_rate": 3e-3, "warmup_steps": 2}
_RECURRENT = {
    "family": "recurrent", "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_query_groups": 2,
    "mean_recurrences": 3, "backprop_recurrences": 2, "depth_curriculum": "linear", "depth_curriculum_steps": 8,
}  # fmt: skip
# Name: program, processes, settings, sections.
RUNS: dict[str, tuple[str, int, list[str], dict]] = {
    "pretrain": (PRETRAIN, 1, [], {}),
    "tp2": (PRETRAIN, 2, ["--parallel.tensor_parallel_size=2", "--parallel.sequence_parallel=true"], {}),
    "pp2": (PRETRAIN, 2, ["--parallel.pipeline_parallel_size=2"], {}),
    "muon": (PRETRAIN, 1, ["--parallel.distributed_optimizer=false"], {"optimizer": _MUON}),
    "recurrent": (PRETRAIN, 1, [], {"model": _RECURRENT}),
    "fsdp": (PRETRAIN, 2, ["--parallel.fsdp=optim_grads_params"], {}),
    "finetune": (FINETUNE, 1, ["--training.sequence_length=128", "--training.global_batch_size=4"], {}),
}


def _where() -> str:
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    processor = " ".join(fields.get(name, "") for name in ("model name", "cpu family", "model"))
    return f"{processor}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_written_down(
    name: str, train: Train, recipe: dict, examples_path: Path, tokenizer_path: Path
) -> None:
    program, num_processes, overrides, sections = RUNS[name]
    if program == FINETUNE:
        sections = {"data": {"train": [str(examples_path)], "tokenizer": str(tokenizer_path)}, **sections}
    steps = train(name, *overrides, program=program, num_processes=num_processes, changes=sections)
    assert len(steps) == 20
    lines = [f"{step['step']} {step['loss']!r} {step['grad_norm']!r}" for step in steps]

    path = GOLDEN / f"{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([f"# {_where()}; step, loss, norm of the gradient", *lines]) + "\n")
    header, *expected = path.read_text().splitlines()
    if _where() in header:
        assert lines == expected
        return
    for ours, theirs in zip(lines, expected, strict=True):
        assert [float(part) for part in ours.split()] == pytest.approx([float(part) for part in theirs.split()], 1e-3)
