"""What a recurrent model's depth costs on the CPU: in steps, in iterations without gradient, and in memory.

python benchmarks/recurrence.py [--recurrences 8] [--steps 8] [--rounds 8] [--hidden-size 128]

One process, one model, the settings of loop_overhead.py:

- pieces of the trainer's own steps at a fixed depth, and of a bare loop over the same Megatron Core calls whose decoder
  passes the same layers and does nothing else (no noise, no measurements, no recomputation), in turns;
- forward and backward passes with more iterations, with gradient or without, in turns: what one more of each costs;
- what autograd keeps for the backward pass, and how far the process' peak memory rises, when only iterations without
  gradient are added.

Seconds on the clock, and of this process on the cores, which other programs on the machine change less. Writes
benchmarks/results/recurrence.json.
"""

import contextlib
import io
import resource
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from loop_overhead import bare_steps, clocks, since
from random_corpus import VOCAB_SIZE, make_indices, make_recipe, measured_on

from megatron_tpt.config.cli import parse, run
from megatron_tpt.files import write_json
from megatron_tpt.recipes.pretrain import PretrainRecipe

RESULTS = Path(__file__).parent / "results"
CLOCKS = ("wall", "cpu")


@dataclass(frozen=True)
class BenchmarkOptions:
    """How much to train, and how often."""

    recurrences: int = 8
    """Iterations of a step, half of them without gradient."""
    steps: int = 8
    """Steps of a piece."""
    rounds: int = 8
    """Pieces of each kind, after one of each that is not counted."""
    hidden_size: int = 128
    """Width of the model; the smaller, the larger the share of what is not a layer."""
    sequence_length: int = 256
    """Tokens per sample."""
    output: Path = RESULTS / "recurrence.json"
    """Where the figures go."""

    @property
    def backprop(self) -> int:
        """Iterations with gradient."""
        return max(1, self.recurrences // 2)


def recipe_of(options: BenchmarkOptions, folder: Path) -> PretrainRecipe:
    """A run of a model of four layers, two of them recurrent, that is over after the last piece."""
    return make_recipe(
        folder,
        hidden_size=options.hidden_size,
        num_layers=4,
        sequence_length=options.sequence_length,
        num_steps=options.steps * (options.rounds + 1) + 1,
        optimizer={"schedule": "constant"},
        data={"train": make_indices(folder, 1, num_documents=500)},
        model={
            "family": "recurrent",
            "num_layers": 4,
            "hidden_size": options.hidden_size,
            "ffn_hidden_size": 3 * options.hidden_size,
            "vocab_size": VOCAB_SIZE,
            "mean_recurrences": options.recurrences,
            "backprop_recurrences": options.backprop,
            "depth_distribution": "fixed",
        },
    )


@contextlib.contextmanager
def bare_decoder(decoder: Any, without_gradient: int, with_gradient: int) -> Iterator[None]:
    """In a `with` block, the decoder only calls its layers and its adapter."""
    import torch

    p, c = decoder.model.prelude_layers, len(decoder.layers) - decoder.model.coda_layers

    def forward(hidden_states: Any, attention_mask: Any, rotary_pos_emb: Any = None, **others: Any) -> Any:
        def passed(hidden: Any, layers: Any) -> Any:
            for layer in layers:
                hidden, _ = layer(hidden, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb)
            return hidden

        def iteration(state: Any) -> Any:
            return passed(decoder.adapter(torch.cat((state, embedded), dim=-1)), decoder.layers[p:c])

        embedded = passed(hidden_states, decoder.layers[:p])
        state = torch.zeros_like(embedded)
        with torch.no_grad():
            for _ in range(without_gradient):
                state = iteration(state)
        for _ in range(with_gradient):
            state = iteration(state)
        return decoder.final_layernorm(passed(state, decoder.layers[c:]))

    decoder.forward = forward  # of the instance: hides that of the class
    try:
        yield
    finally:
        del decoder.forward


def steps_in_turns(options: BenchmarkOptions, trainer: Any) -> dict[str, list[tuple[float, float]]]:
    """Seconds (clock, cores) of every piece of either loop, the first of each omitted."""
    pieces: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
    read = cycle(list(islice(trainer.data.train.iterate(0, options.steps), 2 * options.steps)))
    [gpt] = trainer.model.gpts
    with trainer.running():
        batches = trainer.batches()
        for _ in range(options.rounds + 1):
            begin = clocks()
            for _ in range(options.steps):
                trainer.step(next(batches))
            pieces["ours"].append(since(begin))
            begin = clocks()
            with bare_decoder(gpt.decoder, options.recurrences - options.backprop, options.backprop):
                bare_steps(trainer, read, options.steps)
            pieces["bare"].append(since(begin))
    return {name: seconds[1:] for name, seconds in pieces.items()}


def batch_at(trainer: Any, without_gradient: int, with_gradient: int, num_microbatches: int = 2) -> Any:
    """The first global batch or some of its micro-batches, all with these iterations."""
    from megatron_tpt.training.batches import Batch

    total = without_gradient + with_gradient
    draws = {"recurrences": total, "backprop": with_gradient, "mean_recurrences": total, "seed": 1}
    microbatches = list(islice(trainer.data.train.iterate(0, 1), num_microbatches))
    num_tokens = trainer.recipe.training.batch_size(0) * trainer.recipe.training.sequence_length
    return Batch(microbatches, range(len(microbatches)), num_tokens, [draws] * len(microbatches))


def iterations_in_turns(options: BenchmarkOptions, trainer: Any) -> dict[str, list[tuple[float, float]]]:
    """Seconds (clock, cores) of one more iteration with gradient and of one more without, in every round."""
    s = options.backprop
    batches = {
        name: batch_at(trainer, *depth) for name, depth in (("base", (0, s)), ("with", (0, 2 * s)), ("without", (s, s)))
    }
    costs: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    for _ in range(options.rounds + 1):
        seconds: dict[str, tuple[float, float]] = {}
        for name, batch in batches.items():
            begin = clocks()
            for _ in range(options.steps):
                trainer.model.forward_backward(batch, trainer.objective)
            seconds[name] = since(begin)
        for name, values in costs.items():
            wall, cpu = ((seconds[name][place] - seconds["base"][place]) / (s * options.steps) for place in (0, 1))
            values.append((wall, cpu))
    return {name: values[1:] for name, values in costs.items()}


def memory_by_depth(options: BenchmarkOptions, trainer: Any) -> dict[str, dict[str, float]]:
    """Iterations, the last `backprop` with gradient -> MiB that autograd keeps, parameters not counted, and MiB by
    which the process' peak has risen since the first."""
    import torch

    parameters = {one.untyped_storage().data_ptr() for chunk in trainer.model.chunks for one in chunk.parameters()}
    result: dict[str, dict[str, float]] = {}
    first = 0
    for factor in (1, 1, 2, 4, 8):  # the first time is not counted: it allocates what all need
        depth, kept = factor * options.backprop, dict[int, int]()

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        # One micro-batch: another would be kept where the first was, or not, by chance.
        batch = batch_at(trainer, depth - options.backprop, options.backprop, num_microbatches=1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.model.forward_backward(batch, trainer.objective)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        first = peak if not result else first
        result[str(depth)] = {"kept_mib": sum(kept.values()) / 2**20, "peak_growth_mib": (peak - first) / 2**10}
    return result


def figures_of(options: BenchmarkOptions, trainer: Any) -> dict[str, Any]:
    """All figures."""
    figures: dict[str, Any] = {
        "recurrences": options.recurrences, "with gradient": options.backprop, "steps per piece": options.steps,
        "pieces of each": options.rounds, "hidden size": options.hidden_size,
    }  # fmt: skip
    figures["memory"] = memory_by_depth(options, trainer)  # first: the others raise the peak
    pieces, costs = steps_in_turns(options, trainer), iterations_in_turns(options, trainer)
    for place, clock in enumerate(CLOCKS):
        steps = [ours[place] / bare[place] for ours, bare in zip(pieces["ours"], pieces["bare"], strict=True)]
        figures[f"step_ratio_{clock}"] = {"median": statistics.median(steps), "all": steps}
        for name, seconds in pieces.items():
            figures[f"{name}_{clock}_ms_per_step"] = 1e3 * statistics.median(s[place] for s in seconds) / options.steps
        medians = {name: statistics.median(cost[place] for cost in values) for name, values in costs.items()}
        figures |= {f"iteration_{name}_gradient_{clock}_ms": 1e3 * value for name, value in medians.items()}
        figures[f"iteration_ratio_{clock}"] = medians["without"] / medians["with"]
    return figures | measured_on()


def main() -> None:
    """Measure, print and write the figures."""
    options = parse(BenchmarkOptions)
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(options, Path(folder))
        from megatron_tpt.training.builder import build_trainer
        from megatron_tpt.training.callbacks import default_callbacks
        from megatron_tpt.training.launch import distributed
        from megatron_tpt.training.pretrain_data import build_pretrain_data, prepare_cache

        with distributed(recipe, before=prepare_cache), contextlib.redirect_stdout(io.StringIO()):
            trainer = build_trainer(recipe, build_pretrain_data(recipe), default_callbacks())
            figures = figures_of(options, trainer)
    write_json(options.output, figures, indent=1)
    for clock in CLOCKS:
        print(
            f"{clock}: a step {figures[f'step_ratio_{clock}']['median']:.3f} x the bare calls; an iteration without "
            f"gradient {figures[f'iteration_ratio_{clock}']:.2f} x one with"
        )
    for depth, memory in figures["memory"].items():
        print(f"r = {depth}: {memory['kept_mib']:.1f} MiB kept, peak {memory['peak_growth_mib']:+.1f} MiB")


if __name__ == "__main__":
    run(main)
