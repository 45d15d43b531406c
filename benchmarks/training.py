"""Speed and losses of training on one GPU, in bf16 and in FP8 by each recipe.

python benchmarks/training.py --parts speed-8b speed-3b           # random tokens
python benchmarks/training.py --parts losses --index data/corpus  # a 125M model on an index, the same data in each
python benchmarks/training.py --parts cpu-run --run runs/cpu --index data/corpus   # on a machine without a GPU
python benchmarks/training.py --parts resume --run runs/cpu       # resumes from that run's checkpoint, here
python benchmarks/training.py --tiny --variants bf16 fp32 ...     # the same on two CPU cores, in seconds

speed-8b is the 8B shape with as many of its layers as fit, speed-3b all of the 3B model. Variants take turns, in rounds
of the opposite order, each built again; a variant's figures are medians over its rounds. MFU is of the device's dense
bf16 peak for all of them, so that they can be compared. Each part is written into benchmarks/results/training.json as
soon as it is done, with the parts of earlier calls.
"""

import contextlib
import gc
import io
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.load import recipe_from_dict, to_dict
from megatron_tpt.errors import UserError
from megatron_tpt.files import write_json
from megatron_tpt.recipes.pretrain import PretrainRecipe

RESULTS = Path(__file__).parent / "results"
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32": {"dtype": "float32"},
    "delayed": {"fp8": "delayed"},
    "tensorwise": {"fp8": "tensorwise"},
    "blockwise": {"fp8": "blockwise"},
}
TINY = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 512}
SMALL = {
    "num_layers": 12,
    "hidden_size": 768,
    "ffn_hidden_size": 2048,
    "num_attention_heads": 12,
    "tie_embeddings": True,
}
Part = Literal["speed-8b", "speed-3b", "losses", "cpu-run", "resume"]
Variant = Literal["bf16", "fp32", "delayed", "tensorwise", "blockwise"]


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure, and for how long."""

    parts: tuple[Part, ...] = ("speed-8b", "speed-3b")
    """Parts, one after the other; each is written when it is done."""
    variants: tuple[Variant, ...] = ("bf16", "delayed", "tensorwise", "blockwise")
    """Precisions to compare; the first is what the losses of the others are held against."""
    rounds: int = 2
    """Times that every variant is built and measured."""
    steps: int = 8
    """Measured steps of a round, after `warmup`."""
    warmup: int = 3
    """Steps of a round that are not counted."""
    loss_steps: int = 200
    """Steps of the part losses."""
    num_layers: int | None = None
    """Layers of the 8B shape; as many as fit when not given."""
    index: Path | None = None
    """An index (tools/index.py) for the parts losses and cpu-run."""
    run: Path = Path("runs/training-benchmark")
    """Run folder that cpu-run makes and that resume copies and resumes from."""
    tiny: bool = False
    """A toy model instead: to try the program on a CPU, with --variants bf16 fp32."""
    output: Path = RESULTS / "training.json"
    """Where the figures go."""


def recipe_of(model: dict, training: dict, folder: Path, index: Path | None) -> PretrainRecipe:
    """A run on one device that saves and reports nothing on its own; random tokens without an index."""

    raw = {
        "run": {"output_dir": str(folder)},
        "model": model,
        "training": {"num_steps": 10_000, "global_batch_size": 1, "manual_gc_interval": 0, **training},
        "optimizer": {"learning_rate": 3e-4, "warmup_steps": 20, "schedule": "constant"},
        "data": {"mock": True} if index is None else {"train": str(index)},
    }
    recipe = recipe_from_dict(PretrainRecipe, raw)
    return recipe.with_vocabulary(recipe.tokenizer())


@contextlib.contextmanager
def trainer_of(recipe: PretrainRecipe) -> Iterator[Any]:
    """A trainer without callbacks; what it held is free again afterwards."""
    import torch

    from megatron_tpt.training.builder import build_trainer
    from megatron_tpt.training.launch import distributed
    from megatron_tpt.training.pretrain_data import build_pretrain_data, prepare_cache

    with distributed(recipe, before=prepare_cache), contextlib.redirect_stdout(io.StringIO()):
        holder = [build_trainer(recipe, build_pretrain_data(recipe), [])]
        try:
            yield holder[0]
        finally:
            holder.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def steps_of(trainer: Any, num_steps: int) -> Iterator[tuple[float, float]]:
    """Train. Yields loss and seconds of each step, the device's work included."""
    import torch

    for batch in itertools.islice(trainer.batches(), num_steps):
        begin = time.perf_counter()
        report = trainer.step(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        loss, tokens = report.sums[:2].tolist()
        yield loss / tokens, seconds


def fits(model: dict, training: dict, folder: Path) -> bool:
    """Whether weights, states and activations, and two FP8 copies of the matrices, take at most 90% of the device's
    memory. On a CPU they do."""
    import torch

    from megatron_tpt.models.sizes import stage_matrices
    from megatron_tpt.training.memory import estimate_memory

    if not torch.cuda.is_available():
        return True
    recipe = recipe_of(model, training, folder, None)
    copies = 2 * stage_matrices(recipe.model, recipe.parallel, 0)
    capacity = torch.cuda.get_device_properties(0).total_memory
    return estimate_memory(recipe, 1)[0].total + copies <= 0.9 * capacity


def fitting(options: BenchmarkOptions, model: dict, training: dict, folder: Path) -> tuple[dict, dict]:
    """The model and the training that fit: the 8B shape with fewer layers, any other model with more recomputation."""
    if model.get("preset") == "llama3-8b":
        layers = range(32, 0, -1) if options.num_layers is None else [options.num_layers]
        candidates = [(model | {"num_layers": n}, training) for n in layers]
    else:
        candidates = [(model, training), (model, training | {"recompute": "full"})]
    for candidate in candidates:
        if fits(*candidate, folder):
            return candidate
    raise UserError(f"{model} does not fit on the device: give fewer --num-layers, or omit its part")


def measure_speed(options: BenchmarkOptions, model: dict, folder: Path) -> dict[str, Any]:
    """Tokens/s, TFLOP/s, MFU and peak memory of every variant."""
    import torch

    from megatron_tpt.models.sizes import model_flops_per_token
    from megatron_tpt.training.metrics import device_peak_tflops

    length = 64 if options.tiny else 8192
    training = {"sequence_length": length, "recompute": "selective", "recompute_modules": ["mlp"]}
    model, training = fitting(options, model, training, folder)
    on_gpu = torch.cuda.is_available()
    peak = device_peak_tflops(torch.cuda.get_device_name(), "bf16") if on_gpu else None
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants}
    for number in range(options.rounds):
        for name in options.variants[:: 1 if number % 2 == 0 else -1]:
            recipe = recipe_of(model, training | VARIANTS[name], folder, None)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            with trainer_of(recipe) as trainer:
                seconds = [s for _, s in steps_of(trainer, options.warmup + options.steps)][options.warmup :]
                memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
                del trainer
            rate = length / statistics.median(seconds)
            rounds[name].append({"tokens_per_s": rate, "memory_gib": memory})
            print(f"{name}: {rate:,.0f} tokens/s, {memory:.1f} GiB", flush=True)
    flops = model_flops_per_token(recipe.model, length)
    figures: dict[str, Any] = {"model": to_dict(recipe.model), "training": training, "flops_per_token": flops}
    for variant, measured in rounds.items():
        rate = statistics.median(one["tokens_per_s"] for one in measured)
        tflops = rate * flops / 1e12
        figures[variant] = {
            "tokens_per_s": rate,
            "tflops": tflops,
            "mfu": tflops / peak if peak else None,
            "rounds": measured,
        }
    return figures


def compare_losses(options: BenchmarkOptions, folder: Path) -> dict[str, Any]:
    """Loss curves on the same data, and the largest relative difference from the first variant's."""
    if options.index is None:
        raise UserError("the part losses needs --index")
    model = TINY | {"vocab_size": None} if options.tiny else SMALL
    sizes = {"sequence_length": 64 if options.tiny else 2048, "micro_batch_size": 2 if options.tiny else 8}
    curves = {}
    for name in options.variants:
        training = {**sizes, "global_batch_size": sizes["micro_batch_size"], **VARIANTS[name]}
        with trainer_of(recipe_of(model, training, folder, options.index)) as trainer:
            curves[name] = [loss for loss, _ in steps_of(trainer, options.loss_steps)]
            del trainer
        print(f"{name}: loss {curves[name][0]:.4f} to {curves[name][-1]:.4f}", flush=True)
    first, *others = options.variants
    return {
        "curves": curves,
        "largest_relative_difference": {name: largest_difference(curves[first], curves[name]) for name in others},
    }


def largest_difference(reference: list[float], curve: list[float]) -> float:
    """The largest difference of two curves, relative to the first."""
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(curve, reference, strict=True))


def make_cpu_run(options: BenchmarkOptions, _: Path) -> dict[str, Any]:
    """A run with a checkpoint after 10 steps, and the losses of these and of the 10 that follow."""
    if options.index is None:
        raise UserError("the part cpu-run needs --index")
    if options.run.exists():
        raise UserError(f"--run {options.run} exists: remove it, or name another folder")
    model = TINY | {"vocab_size": None, "hidden_size": 128, "ffn_hidden_size": 256}
    training = {"sequence_length": 64, "micro_batch_size": 2, "global_batch_size": 4}
    with trainer_of(recipe_of(model, training, options.run, options.index)) as trainer:
        before = [loss for loss, _ in steps_of(trainer, 10)]
        trainer.start_saving().finish()
        after = [loss for loss, _ in steps_of(trainer, 10)]
        del trainer
    (options.run / "losses.json").write_text(json.dumps({"before": before, "after": after}))
    return {"losses": before + after}


def resume_cpu_run(options: BenchmarkOptions, folder: Path) -> dict[str, Any]:
    """Losses of the steps after the checkpoint of a copy of that run, and how they differ from the run's own."""
    import yaml

    copy = folder / "copy"
    shutil.copytree(options.run, copy, symlinks=True)
    raw = yaml.safe_load((copy / "run.yaml").read_text())
    raw["run"]["output_dir"] = str(copy)
    if options.index is not None:
        raw["data"]["train"] = str(options.index)
    expected = json.loads((copy / "losses.json").read_text())["after"]
    with trainer_of(recipe_from_dict(PretrainRecipe, raw)) as trainer:
        if trainer.global_step != 10:
            raise UserError(f"{options.run} has no checkpoint of step 10: make it with --parts cpu-run")
        losses = [loss for loss, _ in steps_of(trainer, 10)]
        del trainer
    return {"losses": losses, "expected": expected, "largest_relative_difference": largest_difference(expected, losses)}


def versions() -> dict[str, str]:
    """What was measured."""
    import torch

    found = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "cuda": torch.version.cuda}
    for name in ("torch", "megatron-core", "transformer-engine"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    """Measure the parts that are asked for, and write each."""
    options = parse(BenchmarkOptions)
    shapes: dict[str, dict] = {"speed-8b": {"preset": "llama3-8b"}, "speed-3b": {"preset": "llama3.2-3b"}}
    if options.tiny:
        shapes = dict.fromkeys(shapes, TINY)
    figures = json.loads(options.output.read_text()) if options.output.exists() else {}
    for part in options.parts:
        print(part, flush=True)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if part in shapes:
                result = measure_speed(options, shapes[part], folder)
            else:
                work = {"losses": compare_losses, "cpu-run": make_cpu_run, "resume": resume_cpu_run}[part]
                result = work(options, folder)
        figures[part] = {"versions": versions(), **result}
        write_json(options.output, figures, indent=1)


if __name__ == "__main__":
    run(main)
