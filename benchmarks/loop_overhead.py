"""What the training loop costs compared with a bare loop over the same Megatron Core calls, on the CPU.

python benchmarks/loop_overhead.py [--steps 40] [--rounds 8] [--hidden-size 128] [--num-layers 4]

One process, one model: pieces of the trainer's own steps with its callbacks, and of a bare loop (zero gradients, run
the pipeline schedule over the micro-batches, step the optimizer and the schedule), in turns, on the same indexed data.
The bare loop reads its micro-batches from memory, so the reading is part of what is measured. Seconds on the clock, and
of this process on the cores, which other programs on the machine change less. Writes
benchmarks/results/loop_overhead.json.
"""

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from random_corpus import make_indices, make_recipe, measured_on

from megatron_tpt.config.cli import parse, run
from megatron_tpt.files import write_json
from megatron_tpt.recipes.pretrain import PretrainRecipe

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class BenchmarkOptions:
    """How much to train, and how often."""

    steps: int = 40
    """Steps of a piece."""
    rounds: int = 8
    """Pieces of each loop, after one of each that is not counted."""
    hidden_size: int = 128
    """Width of the model; the smaller, the larger the loop's share of the cost."""
    num_layers: int = 4
    """Layers of the model."""
    sequence_length: int = 256
    """Tokens per sample."""
    output: Path = RESULTS / "loop_overhead.json"
    """Where the figures go."""


def recipe_of(options: BenchmarkOptions, folder: Path) -> PretrainRecipe:
    """A run that reports every 10 steps, and is over (and saves) after the last piece."""
    return make_recipe(
        folder,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        sequence_length=options.sequence_length,
        num_steps=options.steps * (options.rounds + 1) + 1,
        optimizer={"schedule": "constant"},
        data={"train": make_indices(folder, 1, num_documents=500)},
    )


def bare_steps(trainer: Any, batches: Iterator[Any], num_steps: int) -> None:
    """The least that trains: Megatron Core's calls, and a look at the gradient norm."""
    from functools import partial

    from megatron_tpt.training.steps import evaluate_objective, forward_step

    from megatron.core.pipeline_parallel import get_forward_backward_func

    training = trainer.recipe.training
    schedule = get_forward_backward_func()
    evaluate = partial(evaluate_objective, trainer.objective)
    forward = partial(forward_step, needs=trainer.objective.needs, evaluate=evaluate)
    for _ in range(num_steps):
        for chunk in trainer.model.chunks:
            chunk.zero_grad_buffer()
        trainer.model.optimizer.zero_grad()
        schedule(
            forward_step_func=forward,
            data_iterator=batches,
            model=trainer.model.chunks,
            num_microbatches=2,
            seq_length=training.sequence_length,
            micro_batch_size=training.micro_batch_size,
            forward_only=False,
        )
        trainer.model.optimizer.step()
        trainer.model.schedule.step(1)


def clocks() -> tuple[float, float]:
    """Seconds on the clock, and of this process on the cores."""
    return time.perf_counter(), time.process_time()


def since(begin: tuple[float, float]) -> tuple[float, float]:
    """Seconds since then, of either clock."""
    wall, cpu = clocks()
    return wall - begin[0], cpu - begin[1]


def train_in_turns(options: BenchmarkOptions, recipe: PretrainRecipe) -> dict[str, list[tuple[float, float]]]:
    """Seconds (clock, cores) of every piece of either loop, the first of each omitted."""
    from megatron_tpt.training.builder import build_trainer
    from megatron_tpt.training.callbacks import default_callbacks
    from megatron_tpt.training.launch import distributed
    from megatron_tpt.training.pretrain_data import build_pretrain_data, prepare_cache
    from megatron_tpt.training.trainer import Callback, StepReport, Trainer

    pieces: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}

    class TakeTurns(Callback):
        """Lets the bare loop have a piece after every piece of the trainer's."""

        def before_training(self, trainer: Trainer) -> None:
            self.batches = cycle(list(islice(trainer.data.train.iterate(0, options.steps), 2 * options.steps)))
            self.begin = clocks()

        def after_step(self, trainer: Trainer, report: StepReport) -> None:
            if trainer.global_step % options.steps:
                return
            pieces["ours"].append(since(self.begin))
            begin = clocks()
            bare_steps(trainer, self.batches, options.steps)
            pieces["bare"].append(since(begin))
            self.begin = clocks()

    with distributed(recipe, before=prepare_cache), contextlib.redirect_stdout(io.StringIO()):
        build_trainer(recipe, build_pretrain_data(recipe), [*default_callbacks(), TakeTurns()]).fit()
    return {name: seconds[1:] for name, seconds in pieces.items()}


def main() -> None:
    """Measure, print and write the figures."""
    options = parse(BenchmarkOptions)
    with tempfile.TemporaryDirectory() as folder:
        pieces = train_in_turns(options, recipe_of(options, Path(folder)))
    figures: dict[str, Any] = {"steps per piece": options.steps, "pieces of each": options.rounds}
    for place, clock in enumerate(("wall", "cpu")):
        ratios = [ours[place] / bare[place] for ours, bare in zip(pieces["ours"], pieces["bare"], strict=True)]
        figures[f"ratio_{clock}"] = {"median": statistics.median(ratios), "all": ratios}
        for name, seconds in pieces.items():
            figures[f"{name}_{clock}_ms_per_step"] = 1e3 * statistics.median(s[place] for s in seconds) / options.steps
    figures |= measured_on()
    write_json(options.output, figures, indent=1)
    for clock in ("wall", "cpu"):
        ours, bare = figures[f"ours_{clock}_ms_per_step"], figures[f"bare_{clock}_ms_per_step"]
        print(f"{clock}: {ours:.1f} ms a step, bare {bare:.1f}: {figures[f'ratio_{clock}']['median']:.3f} x")


if __name__ == "__main__":
    run(main)
