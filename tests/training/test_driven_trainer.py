"""The trainer as a library: driven by another loop, with other models, with other objectives."""

import gc
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training_runs import Train

from megatron_tpt import platform
from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.objectives.language_modeling import LanguageModeling
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.batches import take_batch
from megatron_tpt.training.builder import build_trainer
from megatron_tpt.training.data import Loader
from megatron_tpt.training.pretrain_data import build_pretrain_data
from megatron_tpt.training.trainer import Callback, Trainer

LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["--parallel.tensor_parallel_size=2", "--parallel.sequence_parallel=true"]),
    "pp2": (2, ["--parallel.pipeline_parallel_size=2", "--parallel.virtual_pipeline_parallel_size=2"]),
    "dp2": (2, []),
}


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, torch.Tensor]]:
    """Filled by the first layout, of one process: log-probabilities [steps, samples, s]."""
    return {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_loop_trains_as_fit_does_and_asks_models_for_log_probabilities(
    layout: str, train: Train, recipe: dict, tmp_path: Path, whole: dict
) -> None:
    """In the order of the samples; those of the model before a step give the loss that the step reports."""
    num_processes, overrides = LAYOUTS[layout]
    changes = {"model": {**recipe["model"], "num_layers": 4}}
    train("start", "--training.num_steps=3", changes=changes)
    start = tmp_path / "start/checkpoints/latest"
    overrides = [*overrides, f"--training.init_from={start}"]
    fitted = train("fitted", *overrides, num_processes=num_processes, changes=changes)[:5]
    options = [*overrides, f"--reference={start}"]
    driven = train("driven", *options, num_processes=num_processes, changes=changes, program="driven_loop")
    assert [[row[name] for name in ("step", "loss", "grad_norm")] for row in driven] == [
        [row[name] for name in ("step", "loss", "grad_norm")] for row in fitted
    ]

    paths = [tmp_path / f"driven.log-probabilities-{rank}.pt" for rank in range(num_processes)]
    ranks = [torch.load(path) for path in paths]
    if layout == "dp2":  # micro-batches of two samples, in turns
        found = {
            name: torch.stack([rank[name].unflatten(1, (-1, 2)) for rank in ranks], dim=2).flatten(1, 3)
            for name in ranks[0]
        }
    else:
        found = ranks[0]
        assert all(torch.equal(rank[name], found[name]) for rank in ranks for name in found)
    assert found["own"].shape == (5, 8, 32)
    assert torch.equal(found["own"][0], found["reference"][0]) and not torch.equal(found["own"], found["reference"])
    assert (-found["own"].mean(dim=(1, 2))).tolist() == pytest.approx([row["loss"] for row in driven], rel=1e-5)
    expected = whole.setdefault("one", found)
    torch.testing.assert_close(found["own"], expected["own"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["reference"], expected["reference"], rtol=1e-5, atol=1e-5)


class Recorder(LanguageModeling):
    """Keeps the seeds of the micro-batches that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[int] = []

    def __call__(self, outputs, batch):
        self.seeds.append(int(batch["seed"]))
        return super().__call__(outputs, batch)


class RunAgain(Callback):
    """Has a step computed twice."""

    def before_update(self, trainer: Trainer, sums: torch.Tensor) -> bool:
        return bool(torch.equal(trainer.run_again(), sums))


def mock_recipe(recipe: dict, folder: Path) -> PretrainRecipe:
    changes = {"data": {"mock": True}, "model": {**recipe["model"], "vocab_size": 320, "hidden_dropout": 0.1}}
    return recipe_from_dict(PretrainRecipe, {**recipe, **changes, "run": {"output_dir": str(folder)}})


@pytest.fixture
def groups() -> Iterator[None]:
    with platform.process_groups(ParallelConfig()):
        yield


def test_seeds_of_micro_batches_are_repeated_by_resume_roll_back_and_re_run(
    recipe: dict, tmp_path: Path, groups: None
) -> None:
    ours = mock_recipe(recipe, tmp_path)

    def build(callbacks: list[Callback]) -> tuple[Trainer, Recorder]:
        objective = Recorder()
        return build_trainer(ours, build_pretrain_data(ours), callbacks, objective), objective

    def take_steps(trainer: Trainer, num_steps: int) -> list[float]:
        return [trainer.step(batch).grad_norm for batch in itertools.islice(trainer.batches(), num_steps)]

    trainer, objective = build([])
    take_steps(trainer, 2)
    trainer.start_saving().finish()
    norms = take_steps(trainer, 2)
    seeds = objective.seeds
    assert len(seeds) == len(set(seeds)) == 4 * 4
    trainer.roll_back()
    assert take_steps(trainer, 2) == norms
    assert seeds[16:] == seeds[8:16]

    resumed, objective = build([RunAgain()])
    assert resumed.global_step == 2
    assert take_steps(resumed, 2) == norms, "a step computed twice is the same"
    assert objective.seeds == [*seeds[8:12] * 2, *seeds[12:16] * 2]


def test_seeds_depend_on_the_place_in_the_global_batch_and_not_on_the_rank() -> None:
    training = TrainingConfig(global_batch_size=8, micro_batch_size=1)

    def seeds(num_ranks: int) -> list[tuple[int, ...]]:
        return [
            take_batch(Loader([], training, rank, num_ranks, 8), iter([]), 3, run_seed=1, model=GPTConfig()).seeds
            for rank in range(num_ranks)
        ]

    ((*one,),), (first, second) = seeds(1), seeds(2)
    assert one[::2] == [*first] and one[1::2] == [*second]


def test_training_on_logits_follows_training_on_token_losses(recipe: dict, tmp_path: Path, groups: None) -> None:
    found = []
    for needs in ("token_losses", "logits"):
        ours = mock_recipe(recipe, tmp_path / needs)
        trainer = build_trainer(ours, build_pretrain_data(ours), [], LanguageModeling(needs=needs))
        found.append([trainer.step(batch) for batch in itertools.islice(trainer.batches(), 4)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.sums.tolist() == pytest.approx(theirs.sums.tolist(), rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)


def test_a_model_is_freed_with_its_trainer(recipe: dict, tmp_path: Path) -> None:
    ours = mock_recipe(recipe, tmp_path)
    with platform.process_groups(ParallelConfig()):
        trainer = build_trainer(ours, build_pretrain_data(ours), [])
        with trainer.running():
            trainer.step(next(trainer.batches()))
        model = weakref.ref(trainer.model.chunks[0])
    del trainer
    gc.collect()
    assert model() is None
