"""Where the time of an iteration of reinforcement learning goes, on the CPU, and what an update of weights takes.

python benchmarks/rl_overhead.py [--iterations 4] [--hidden-size 256] [--num-layers 4] [--engine vllm]

GRPO with a reference and REPRO on a model with random weights, whose answers are all wrong, which costs the same. The
first iteration is not counted. Seconds are of the rank's clock: generation, log-probabilities, REPRO's losses, the
update of the engine's weights with its check, and optimizer steps; what is left is overhead, grading included.
`update_s` is one call of the engine's update_weights on a model of its own size, --update-hidden-size and
--update-num-layers. Writes benchmarks/results/rl_overhead.json.
"""

import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from random_corpus import VOCAB_SIZE, make_indices, measured_on

from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.fields import NonNegativeInt, PositiveInt
from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.errors import require
from megatron_tpt.files import write_json
from megatron_tpt.recipes.rl import RLRecipe

RESULTS = Path(__file__).parent / "results"
PARTS = ("generation", "log_probabilities", "process", "weights")
"""Of the metrics seconds/*."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """How much to train, and with what."""

    iterations: Annotated[int, Ge(2)] = 4
    """Iterations, the first of which is not counted."""
    num_prompts: PositiveInt = 4
    """Prompts of an iteration."""
    num_samples: PositiveInt = 8
    """Rollouts of a prompt."""
    max_new_tokens: PositiveInt = 192
    """Longest rollout in tokens; random weights seldom end before."""
    hidden_size: PositiveInt = 256
    """Width of the model."""
    num_layers: PositiveInt = 4
    """Layers of the model."""
    update_hidden_size: PositiveInt = 768
    """Width of the model whose update is measured; with twelve layers 100M parameters."""
    update_num_layers: NonNegativeInt = 12
    """Its layers; 0: not measured."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """What samples."""
    output: Path = RESULTS / "rl_overhead.json"
    """Where the figures go."""

    def __post_init__(self) -> None:
        rollouts = self.num_prompts * self.num_samples
        require(
            rollouts % 2 == 0, f"--num-samples: {rollouts} rollouts make no two steps of one size: give an even number"
        )


def make_model(folder: Path, tokenizer: Path, hidden_size: int, num_layers: int, vocab_size: int) -> int:
    """Write a Llama model with random weights, which engines can open. Returns the number of its parameters."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer_of = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer_of.eos_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer_of.save_pretrained(folder)
    return int(model.num_parameters())


def recipe_of(options: BenchmarkOptions, folder: Path) -> RLRecipe:
    """Two optimizer steps an iteration, which are reported one by one."""
    num_rollouts = options.num_prompts * options.num_samples
    raw = {
        "run": {"output_dir": str(folder / "run")},
        "training": {
            "init_from": str(folder / "start"), "num_steps": 2 * options.iterations, "dtype": "float32",
            "global_batch_size": num_rollouts // 2, "micro_batch_size": 1,
            "sequence_length": options.max_new_tokens + 32,
        },
        "checkpoint": {"save_interval": 0},
        "logging": {"log_interval": 1, "tensorboard": False},
        "data": {"train": [str(folder / "problems.jsonl")]},
        "rollouts": {
            "num_prompts": options.num_prompts, "num_samples": options.num_samples, "engine": options.engine,
            "max_new_tokens": options.max_new_tokens, "max_num_seqs": num_rollouts, "max_gap": 1e-3,
        },
        "algorithm": {"kl": "loss"},
        "repro": {"enabled": True, "answer_template": "{}"},
    }  # fmt: skip
    recipe = recipe_from_dict(RLRecipe, raw).resolve()
    assert isinstance(recipe, RLRecipe)
    return recipe.with_vocabulary(recipe.tokenizer())


def train(recipe: RLRecipe) -> list[float]:
    """Run the recipe. Returns the time at the end of every step, in seconds."""
    from unittest.mock import patch

    from megatron_tpt.rl.loop import train as run_loop
    from megatron_tpt.training.launch import distributed
    from megatron_tpt.training.trainer import Callback, StepReport, Trainer

    ends: list[float] = []

    class Clock(Callback):
        def after_step(self, trainer: Trainer, report: StepReport) -> None:
            ends.append(time.perf_counter())

    callbacks = recipe.build_callbacks
    with (
        patch.object(recipe, "build_callbacks", lambda: [*callbacks(), Clock()]),
        distributed(recipe, before=RLRecipe.prepare_data),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        run_loop(recipe)
    return ends


def shares(rows: Sequence[Mapping[str, float]], ends: Sequence[float], steps: int) -> dict[str, Any]:
    """Seconds of the iterations after the first, and the share of each of its parts: medians.

    `rows` are the lines of metrics.jsonl, `ends` the time at the end of every step, `steps` those of an iteration.
    """
    seconds: dict[str, list[float]] = {name: [] for name in (*PARTS, "steps", "overhead", "iteration")}
    for begin in range(steps, len(ends), steps):
        own: dict[str, float] = {}
        for row in rows:
            if begin < row["step"] <= begin + steps:
                own |= {name: row[f"seconds/{name}"] for name in PARTS if f"seconds/{name}" in row}
                own["steps"] = own.get("steps", 0.0) + row.get("step_s", 0.0)
        own["iteration"] = ends[begin + steps - 1] - ends[begin - 1]
        own["overhead"] = 2 * own["iteration"] - sum(own.values())
        for name, value in own.items():
            seconds[name].append(value)
    whole = seconds.pop("iteration")
    return {
        "iteration_s": statistics.median(whole),
        "shares": {
            name: statistics.median(part / one for part, one in zip(values, whole, strict=True))
            for name, values in seconds.items()
        },
    }


def update_seconds(folder: Path, engine: Literal["vllm", "transformers"], rounds: int = 5) -> float:
    """The median time of an update of the weights."""
    from safetensors.torch import load_file

    from megatron_tpt.generation import EngineOptions, open_engine

    weights = load_file(folder / "model.safetensors")
    seconds = []
    with open_engine(EngineOptions(str(folder), 256, max_num_seqs=4, kind=engine), needs=["update_weights"]) as opened:
        for version in range(1, rounds + 2):
            begin = time.perf_counter()
            opened.update_weights(weights.items(), version)
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def main() -> None:
    """Measure, print and write the figures."""
    from megatron_tpt.interop.hf_import import import_hf
    from megatron_tpt.interop.options import ImportOptions

    options, figures = parse(BenchmarkOptions), dict[str, Any]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_indices(folder, 1, num_documents=200)
        tokenizer = folder / "tokenizer"
        figures["parameters"] = make_model(
            folder / "model", tokenizer, options.hidden_size, options.num_layers, VOCAB_SIZE
        )
        import_hf(ImportOptions(folder / "model", folder / "start"))
        problems = [{"id": str(i), "prompt": f"abcde {i}", "answer": "never"} for i in range(options.num_prompts)]
        (folder / "problems.jsonl").write_text("".join(json.dumps(one) + "\n" for one in problems))
        recipe = recipe_of(options, folder)
        ends = train(recipe)
        rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        figures |= shares(rows, ends, recipe.steps_per_iteration)
        if options.update_num_layers:
            sizes = (options.update_hidden_size, options.update_num_layers, 20_000)
            figures["update_parameters"] = make_model(folder / "large", tokenizer, *sizes)
            figures["update_s"] = update_seconds(folder / "large", options.engine)
    figures |= {"engine": options.engine} | measured_on()
    write_json(options.output, figures, indent=1)
    for part, share in figures["shares"].items():
        print(f"{part:18} {share:6.1%}")
    print(f"an iteration takes {figures['iteration_s']:.2f} s")
    if "update_s" in figures:
        print(f"an update of {figures['update_parameters'] / 1e6:.0f}M parameters takes {figures['update_s']:.2f} s")


if __name__ == "__main__":
    run(main)
