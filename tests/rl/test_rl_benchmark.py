"""The benchmark of the loop: its shares are of the whole, and it runs from end to end."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_tpt.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.append(str(BENCHMARKS))  # random_corpus.py
    spec = importlib.util.spec_from_file_location("rl_overhead", BENCHMARKS / "rl_overhead.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_no_part_of_an_iteration_is_overhead(benchmark: ModuleType) -> None:
    """Of two iterations of two steps; the first is not counted."""
    parts = {"generation": 4.0, "log_probabilities": 1.0, "process": 2.0, "weights": 0.5}
    rows = [{"step": step, "step_s": 0.75} for step in (1, 2, 3, 4)]
    rows += [{"step": step, **{f"seconds/{name}": value for name, value in parts.items()}} for step in (1, 3)]
    found = benchmark.shares(rows, [90.0, 100.0, 109.0, 110.0], 2)
    assert found["iteration_s"] == 10
    expected = {"generation": 0.4, "log_probabilities": 0.1, "process": 0.2, "weights": 0.05, "steps": 0.15}
    assert found["shares"] == pytest.approx(expected | {"overhead": 0.1})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("--iterations 1", "iterations 1: must be 2 or more"),  # the first is not counted
        ("--num-prompts 1 --num-samples 3", "3 rollouts make no two steps of one size"),
    ],
)
def test_sizes_without_figures_are_refused(
    sizes: str, message: str, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["rl_overhead.py", *sizes.split()])
    with pytest.raises(UserError, match=message):
        benchmark.parse(benchmark.BenchmarkOptions)


@pytest.mark.slow(minutes=1)
def test_it_runs_tiny(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = "--iterations 2 --max-new-tokens 8 --hidden-size 64 --num-layers 1 --num-samples 2"
    sizes += " --update-hidden-size 64 --update-num-layers 1 --engine transformers"
    output = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["rl_overhead.py", *sizes.split(), "--output", str(output)])
    benchmark.main()
    figures = json.loads(output.read_text())
    assert sum(figures["shares"].values()) == pytest.approx(1)
    assert all(share > 0 for share in figures["shares"].values())
    assert figures["update_s"] > 0 and figures["iteration_s"] > 0
