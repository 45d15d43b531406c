"""How long a training step waits for its data, on the CPU: reading from many indexed files, in the training process.

python benchmarks/data_wait.py [--files 100] [--steps 100] [--num-workers 0] [--hidden-size 128] [--num-layers 4]

One process trains on a blend of all the files with the trainer and its callbacks. Of every step the time in which it
asks for micro-batches (reading, cutting and collating samples) is measured, and the whole step. The files are new, so
in the page cache. Writes benchmarks/results/data_wait.json.
"""

import contextlib
import io
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_corpus import make_indices, make_recipe, measured_on

from megatron_tpt.config.cli import parse, run
from megatron_tpt.files import write_json
from megatron_tpt.recipes.pretrain import PretrainRecipe

RESULTS = Path(__file__).parent / "results"
WARM_UP = 10


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is read, and by which model."""

    files: int = 100
    """Indexed files, each a source of the blend."""
    documents: int = 200
    """Documents in each."""
    steps: int = 100
    """Steps that are measured, after 10 that are not."""
    num_workers: int = 0
    """Processes that read ahead; 0 reads in the training process."""
    hidden_size: int = 128
    """Width of the model; the smaller, the larger the part of the data."""
    num_layers: int = 4
    """Layers of the model."""
    sequence_length: int = 256
    """Tokens per sample."""
    output: Path = RESULTS / "data_wait.json"
    """Where the figures go."""


def recipe_of(options: BenchmarkOptions, folder: Path) -> PretrainRecipe:
    """A run of as many steps as are measured, and the first ones."""
    indices = make_indices(folder, options.files, num_documents=options.documents)
    return make_recipe(
        folder,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        sequence_length=options.sequence_length,
        num_steps=WARM_UP + options.steps,
        data={"train": indices, "num_workers": options.num_workers},
    )


def train(recipe: PretrainRecipe) -> list[tuple[float, float]]:
    """Seconds of waiting, and of the whole, for every step."""
    from megatron_tpt.training.builder import build_trainer
    from megatron_tpt.training.callbacks import default_callbacks
    from megatron_tpt.training.launch import distributed
    from megatron_tpt.training.pretrain_data import build_pretrain_data, prepare_cache
    from megatron_tpt.training.trainer import Callback, StepReport, Trainer

    steps: list[tuple[float, float]] = []

    class Listen(Callback):
        """Keeps the times of every step."""

        def after_step(self, trainer: Trainer, report: StepReport) -> None:
            steps.append((report.data_wait_s, report.seconds))

    with distributed(recipe, before=prepare_cache), contextlib.redirect_stdout(io.StringIO()):
        build_trainer(recipe, build_pretrain_data(recipe), [*default_callbacks(), Listen()]).fit()
    return steps[WARM_UP:]


def main() -> None:
    """Measure, print and write the figures."""
    options = parse(BenchmarkOptions)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        steps = train(recipe_of(options, Path(folder)))
    waits, seconds = [step[0] for step in steps], [step[1] for step in steps]
    figures: dict[str, Any] = {
        "files": options.files,
        "steps": options.steps,
        "num_workers": options.num_workers,
        "part_of_step_time": sum(waits) / sum(seconds),
        "wait_ms": {"median": 1e3 * statistics.median(waits), "max": 1e3 * max(waits)},
        "step_ms": {"median": 1e3 * statistics.median(seconds), "max": 1e3 * max(seconds)},
        "tokens_per_step": 4 * options.sequence_length,
        **measured_on(),
    }
    write_json(options.output, figures, indent=1)
    print(
        f"{options.files} files: {figures['wait_ms']['median']:.2f} ms of {figures['step_ms']['median']:.1f} ms a step "
        f"are waiting for data, {figures['part_of_step_time']:.2%} of all time"
    )


if __name__ == "__main__":
    run(main)
