"""The benchmark of depth compares like with like, and runs from end to end."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_tpt.training.batches import DRAWN, Batch
from megatron_tpt.training.builder import build_trainer
from megatron_tpt.training.launch import distributed
from megatron_tpt.training.optimizer import local_gradient
from megatron_tpt.training.pretrain_data import build_pretrain_data, prepare_cache

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {"recurrences": 4, "steps": 1, "rounds": 1, "hidden_size": 32, "sequence_length": 32}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import recurrence

    return recurrence


def test_the_bare_decoder_computes_the_same_and_iterations_without_gradient_keep_nothing(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    options = benchmark.BenchmarkOptions(**TINY)
    recipe = benchmark.recipe_of(options, tmp_path)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, state_std=0.0))
    with distributed(recipe, before=prepare_cache):
        trainer = build_trainer(recipe, build_pretrain_data(recipe), [])
        batch, [gpt] = benchmark.batch_at(trainer, 2, 2), trainer.model.gpts
        plain = [{name: value for name, value in one.items() if not name.startswith(DRAWN)} for one in batch]
        without_draws = Batch(plain, batch.seeds, batch.num_tokens)

        def computed(batch: Batch) -> tuple[float, torch.Tensor]:
            loss = float(trainer.model.forward_backward(batch, trainer.objective)[0])
            return loss, torch.cat([local_gradient(one).flatten() for one in gpt.parameters()]).clone()

        ours = computed(batch)
        with benchmark.bare_decoder(gpt.decoder, 2, 2):
            bare = computed(without_draws)
        assert ours[0] == pytest.approx(bare[0], rel=1e-6) and float(ours[1].norm()) > 0
        torch.testing.assert_close(ours[1], bare[1], rtol=1e-4, atol=1e-6)
        with benchmark.bare_decoder(gpt.decoder, 1, 2):
            assert computed(without_draws)[0] != pytest.approx(bare[0], rel=1e-6)
        kept = [one["kept_mib"] for one in benchmark.memory_by_depth(options, trainer).values()]
        assert len(kept) == 4 and max(kept) <= 1.01 * min(kept)


@pytest.mark.slow
def test_the_benchmark_writes_its_figures(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["recurrence.py", *words, "--output", str(tmp_path / "figures.json")])
    benchmark.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["memory"]) == ["2", "4", "8", "16"] and figures["with gradient"] == 2
    for clock in ("wall", "cpu"):
        assert len(figures[f"step_ratio_{clock}"]["all"]) == 1 and figures[f"step_ratio_{clock}"]["median"] > 0
        assert isinstance(figures[f"iteration_ratio_{clock}"], float)
