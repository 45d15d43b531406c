"""The benchmark of training runs on a CPU from end to end, and its figures are those of what it trained."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.metrics import model_flops_per_token

PROGRAM = Path(__file__).parents[2] / "benchmarks/training.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_training", PROGRAM)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny model is for a CPU")
@pytest.mark.slow
def test_every_part_runs_tiny_and_adds_to_the_results(
    benchmark: ModuleType, index_prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, run = tmp_path / "training.json", tmp_path / "cpu"

    def measure(*parts: str) -> dict:
        options = ["--tiny", "--variants", "bf16", "fp32", "--rounds", "2", "--steps", "1", "--warmup", "0"]
        paths = ["--loss-steps", "4", "--index", str(index_prefix), "--run", str(run), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["training.py", *options, *paths, "--parts", *parts])
        benchmark.main()
        return json.loads(output.read_text())

    measure("speed-8b", "losses")
    figures = measure("cpu-run", "resume")
    assert list(figures) == ["speed-8b", "losses", "cpu-run", "resume"]
    speed = figures["speed-8b"]
    model = recipe_from_dict(PretrainRecipe, {"model": speed["model"]}).model
    assert speed["flops_per_token"] == model_flops_per_token(model, speed["training"]["sequence_length"])
    assert len(speed["fp32"]["rounds"]) == 2 and speed["fp32"]["tokens_per_s"] > 0 and speed["fp32"]["mfu"] is None
    assert speed["bf16"]["tflops"] == pytest.approx(speed["bf16"]["tokens_per_s"] * speed["flops_per_token"] / 1e12)
    curves = figures["losses"]["curves"]
    assert 0 < figures["losses"]["largest_relative_difference"]["fp32"] < 0.01
    assert [len(curve) for curve in curves.values()] == [4, 4]
    resumed = figures["resume"]
    assert resumed["losses"] == figures["cpu-run"]["losses"][10:] and resumed["largest_relative_difference"] == 0.0
    assert figures["resume"]["versions"]["device"] == "CPU"


def test_the_difference_of_curves_is_the_largest_and_relative(benchmark: ModuleType) -> None:
    assert benchmark.largest_difference([2.0, 4.0, 1.0], [2.1, 4.0, 0.9]) == pytest.approx(0.1)
