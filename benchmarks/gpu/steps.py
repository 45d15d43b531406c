"""The ten steps of half an hour on a GPU, in order of their value. Each has parts, of which each is written when done.

A dry run does the same on a CPU with toy shapes: Megatron Core's own kernels stand in for Transformer Engine's, fp32
for FP8.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import training as bench
from benchmarks.gpu import comparisons, smoke
from benchmarks.gpu.record import Record, read

FP8 = ("delayed", "tensorwise", "blockwise")
SMALL = {"num_layers": 4, "hidden_size": 1024, "ffn_hidden_size": 2816, "num_attention_heads": 16}
SMALL |= {"num_query_groups": 4, "vocab_size": 32768}
RECOMPUTED: dict[str, dict[str, Any]] = {
    "mlp recomputed": {"recompute": "selective", "recompute_modules": ["mlp"]},
    "all recomputed": {"recompute": "full"},
}
GOAL_MFU, GOAL_FP8, GOAL_LOSS = 0.45, 1.3, 0.01
"""bf16's share of the device's dense peak, FP8's tokens/s over bf16's, the largest relative difference of losses."""


@dataclass(frozen=True)
class Session:
    """What a step has at hand."""

    record: Record
    index: Path
    """Of real text."""
    dry: bool

    @property
    def variants(self) -> tuple[str, ...]:
        """Precisions, the reference first."""
        return ("bf16", "fp32") if self.dry else ("bf16", *FP8)

    @property
    def small(self) -> dict[str, Any]:
        """A small model."""
        return dict(bench.TINY) if self.dry else dict(SMALL)

    @contextmanager
    def trainer(self, model: dict, training: dict, index: Path | None = None) -> Iterator[Any]:
        """A trainer of a run in a folder of its own, on random tokens without an index."""
        with (
            tempfile.TemporaryDirectory() as folder,
            bench.trainer_of(bench.recipe_of(model, training, Path(folder), index)) as trainer,
        ):
            yield trainer


def smoke_test(session: Session) -> None:
    """1. Versions; a linear layer in every FP8 recipe; bare speeds."""
    once, linears = session.record.once, smoke.Linears()
    once("versions", bench.versions)
    once("errors", lambda: smoke.errors(linears, 128 if session.dry else 2048))
    once("tflops", lambda: smoke.speeds(linears, 128 if session.dry else 8192))


def compare_kernels(session: Session) -> None:
    """2. Transformer Engine's kernels against plain torch, and a small model of them against Megatron Core's own."""
    training = {"sequence_length": 64 if session.dry else 1024, "global_batch_size": 2}
    recipe = bench.recipe_of(session.small, training, Path(tempfile.gettempdir()), None)
    for name in comparisons.KERNELS:
        session.record.once(name, lambda name=name: comparisons.compare_kernel(name, recipe))  # type: ignore[misc]
    session.record.once("model", lambda: comparisons.compare_models(session.trainer, session.small, training))


def _speed(session: Session, model: dict[str, Any]) -> None:
    for variant in session.variants:
        options = bench.BenchmarkOptions(
            variants=(variant,),  # type: ignore[arg-type]
            rounds=1,
            steps=2 if session.dry else 8,
            tiny=session.dry,
        )
        with tempfile.TemporaryDirectory() as folder:
            shape = bench.TINY if session.dry else model
            session.record.once(variant, lambda: bench.measure_speed(options, shape, Path(folder)))  # noqa: B023
    found = read(session.record.path)[session.record.step]
    rates = {name: found[name][name]["tokens_per_s"] for name in session.variants if name in found[name]}
    if "bf16" in rates:
        mfu = found["bf16"]["bf16"]["mfu"]
        speedups = {name: rate / rates["bf16"] for name, rate in rates.items()}
        goals = {f"bf16 has {GOAL_MFU:.0%} MFU": mfu is not None and mfu >= GOAL_MFU}
        goals[f"an FP8 recipe has {GOAL_FP8} times bf16's tokens/s"] = max(speedups.values()) >= GOAL_FP8
        session.record.write("summary", {"mfu": mfu, "speedups": speedups, "goals": goals})


def speed_8b(session: Session) -> None:
    """3. The 8B shape, as many layers as fit, at 8,192 tokens: bf16, then each FP8 recipe."""
    _speed(session, {"preset": "llama3-8b"})


def speed_3b(session: Session) -> None:
    """4. The same of the whole 3B model."""
    _speed(session, {"preset": "llama3.2-3b"})


def losses(session: Session) -> None:
    """5. Losses of 200 steps of a 125M model on real text in each precision."""
    curves = {}
    for variant in session.variants:
        options = bench.BenchmarkOptions(
            variants=(variant,),  # type: ignore[arg-type]
            loss_steps=4 if session.dry else 200,
            tiny=session.dry,
            index=session.index,
        )
        with tempfile.TemporaryDirectory() as folder:
            found = session.record.once(variant, lambda: bench.compare_losses(options, Path(folder)))  # noqa: B023
        curves[variant] = found.get("curves", {}).get(variant)
    first, *others = session.variants
    if all(curves.values()):
        differences = {name: bench.largest_difference(curves[first], curves[name]) for name in others}
        goals = {f"{name} within {GOAL_LOSS:.0%}": value <= GOAL_LOSS for name, value in differences.items()}
        session.record.write("summary", {"largest_relative_difference": differences, "goals": goals})


def memory(session: Session) -> None:
    """6. What training takes of the memory against what --dry-run computes."""
    model = session.small if session.dry else {"preset": "llama3-8b", "num_layers": 4}
    length = 64 if session.dry else 8192
    changes = {"bf16": {}, **RECOMPUTED} | ({} if session.dry else {"tensorwise": {"fp8": "tensorwise"}})
    for name, change in changes.items():
        training = {"sequence_length": length, **change}
        session.record.once(
            name,
            lambda training=training: comparisons.measure_memory(session.trainer, model, training),  # type: ignore[misc]
        )


def packed_attention(session: Session) -> None:
    """7. Packed examples against the same behind a mask, and each alone."""
    length = 96 if session.dry else 3072
    session.record.once("examples", lambda: comparisons.compare_packed(session.trainer, session.small, length))


def options(session: Session) -> None:
    """8. Recomputation, CPU offload and asynchronous checkpoints: equal losses, and what they cost."""
    model = session.small if session.dry else {"preset": "llama3-8b", "num_layers": 4}
    training = {"sequence_length": 64 if session.dry else 8192}
    steps = 3 if session.dry else 8
    changes = {"plain": {}, **RECOMPUTED, "offloaded": {"cpu_offload_layers": 3}}
    for name, change in changes.items():
        if name == "offloaded" and session.dry:
            session.record.write(name, {"skipped": "a CPU has nowhere to offload to"})
            continue
        setting = training | change
        session.record.once(
            name,
            lambda setting=setting: comparisons.time_steps(session.trainer, model, setting, steps),  # type: ignore[misc]
        )
    session.record.once(
        "asynchronous checkpoint", lambda: comparisons.time_checkpoint(session.trainer, model, training, steps)
    )


def _elsewhere(session: Session, part: str, folder: Path, *, on_cpu: bool) -> dict[str, Any]:
    """A part of benchmarks/training.py in a process of its own, on the CPU alone or with the GPU."""
    output = folder / f"{part}-{'cpu' if on_cpu else 'gpu'}.json"
    command = [sys.executable, bench.__file__, "--parts", part, "--run", str(folder / "run"), "--output", str(output)]
    command += ["--index", str(session.index)]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"} if on_cpu else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-1000:]}")
    figures: dict[str, Any] = json.loads(output.read_text())[part]
    return figures


def checkpoints(session: Session) -> None:
    """9. A checkpoint made without a GPU resumed with one, and the other way round."""

    def handed_over(*, from_cpu: bool) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            made = _elsewhere(session, "cpu-run", Path(name), on_cpu=from_cpu)
            resumed = _elsewhere(session, "resume", Path(name), on_cpu=not from_cpu)
        devices = {"made_on": made["versions"]["device"], "resumed_on": resumed["versions"]["device"]}
        return devices | {key: resumed[key] for key in ("losses", "expected", "largest_relative_difference")}

    session.record.once("from a CPU", lambda: handed_over(from_cpu=True))
    session.record.once("to a CPU", lambda: handed_over(from_cpu=False))


def thinking(session: Session) -> None:
    """10. What the thinking job costs on top of vLLM, where vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        session.record.write("overhead", {"skipped": "vLLM is not installed here: its wheels are too large to carry"})
        return

    def overhead() -> dict[str, Any]:
        program = Path(bench.__file__).with_name("augmenting.py")
        with tempfile.TemporaryDirectory() as name:
            data, output = Path(name) / "questions.jsonl", Path(name) / "augmenting.json"
            rows = ({"question": f"How much is {i} and {i + 7}?", "answer": f"It is {2 * i + 7}."} for i in range(256))
            data.write_text(
                "".join(json.dumps(row) + "\n" for row in itertools.islice(rows, 12 if session.dry else 256))
            )
            sizes = {"num-documents": 12, "max-num-seqs": 4, "max-new-tokens": 8, "rounds": 1}
            if not session.dry:
                sizes = {"num-documents": 256, "max-num-seqs": 64, "max-new-tokens": 512, "rounds": 4}
            command = [sys.executable, str(program), "--data", str(data), "--output", str(output)]
            command += [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
            subprocess.run(command, check=True)
            figures: dict[str, Any] = json.loads(output.read_text())
            return figures

    session.record.once("overhead", overhead)


@dataclass(frozen=True)
class Step:
    """A step, and the seconds after which it is ended."""

    run: Callable[[Session], None]
    limit_s: int


STEPS: dict[str, Step] = {
    "smoke": Step(smoke_test, 150),
    "kernels": Step(compare_kernels, 200),
    "speed-8b": Step(speed_8b, 360),
    "speed-3b": Step(speed_3b, 300),
    "losses": Step(losses, 300),
    "memory": Step(memory, 200),
    "packed": Step(packed_attention, 120),
    "options": Step(options, 240),
    "checkpoints": Step(checkpoints, 240),
    "thinking": Step(thinking, 300),
}
"""By name, in the order in which they are numbered from 1."""
