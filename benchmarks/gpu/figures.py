"""Runs the steps of benchmarks/gpu/steps.py one after another, each in a process of its own, and writes their figures.

Called by benchmarks/gpu_figures.sh, which says how.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.record import Record, failures, read
from megatron_tpt.config.cli import parse, run
from megatron_tpt.errors import StoppedEarly, UserError

ROOT = Path(__file__).parents[2]
DONE = "done"
"""The part of a step that says that all others are there."""


@dataclass(frozen=True)
class FigureOptions:
    """What to measure, and where the figures go."""

    steps: tuple[str, ...] = ()
    """Steps by name or number, all when not given; those that are done are not repeated."""
    dry: bool = False
    """Toy shapes on a CPU."""
    index: Path | None = None
    """An index of real text; one is made of the installed packages when not given."""
    output: Path | None = None
    """The file of figures: benchmarks/results/gpu.json, or runs/gpu-dry/gpu.json of a dry run, when not given."""
    minutes: float = 28.0
    """Time limit for all steps: none starts or continues after it."""
    inside: bool = field(default=False, metadata={"hidden": True})
    """Run one step in this process."""


def chosen(options: FigureOptions) -> list[str]:
    """The names of the steps that are asked for, in their order."""
    from benchmarks.gpu.steps import STEPS

    names = list(STEPS)
    numbered = {str(number): name for number, name in enumerate(names, start=1)}
    asked = {numbered.get(step, step) for step in options.steps} or set(names)
    if unknown := sorted(asked - set(names)):
        known = ", ".join(f"{number} {name}" for number, name in numbered.items())
        raise UserError(f"--steps: {unknown[0]} is no step: give names or numbers of {known}")
    return [name for name in names if name in asked]


def output_of(options: FigureOptions) -> Path:
    """Where the figures go."""
    usual = ROOT / ("runs/gpu-dry/gpu.json" if options.dry else "benchmarks/results/gpu.json")
    return (options.output or usual).absolute()


def is_done(path: Path, step: str) -> bool:
    """Whether nothing of a step is left to measure."""
    parts = read(path).get(step, {})
    return DONE in parts and not failures(parts)


def run_step(options: FigureOptions, name: str) -> None:
    """One step, in this process. The index is made where it is needed for the first time."""
    from benchmarks.gpu.real_text import TextOptions, make_index
    from benchmarks.gpu.steps import STEPS, Session

    path = output_of(options)
    index = options.index
    if index is None and name in ("losses", "checkpoints"):
        sizes = {"num_bytes": 200_000, "vocab_size": 512} if options.dry else {}
        index = make_index(TextOptions(output=path.with_name("text-dry" if options.dry else "text"), **sizes))
    record = Record(path, name)
    STEPS[name].run(Session(record, index or Path(), options.dry))
    if not failures(read(path)[name]):
        record.write(DONE, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))


def run_limited(command: list[str], limit_s: float) -> int | None:
    """The exit code of a command, None where it was ended at its limit. The processes that it leaves are ended too:
    they would hold the GPU's memory."""
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def start_step(options: FigureOptions, name: str, limit_s: float) -> str | None:
    """One step in its own process, which can fail or be ended without the others. Returns what went wrong."""
    command = [sys.executable, "-m", "benchmarks.gpu.figures", "--inside", "--steps", name]
    command += ["--output", str(output_of(options)), *(["--dry"] if options.dry else [])]
    command += ["--index", str(options.index.absolute())] if options.index is not None else []
    code = run_limited(command, limit_s)
    if code is None:
        return f"ended after {limit_s:.0f} s"
    if code:
        return f"ended with code {code}"
    failed = failures(read(output_of(options))[name])
    return f"failed: {', '.join(failed)}" if failed else None


def main() -> None:
    """All steps that are asked for and not done."""
    options = parse(FigureOptions)
    if options.inside:
        run_step(options, *options.steps)
        return
    from benchmarks.gpu.steps import STEPS

    path, begin, problems = output_of(options), time.monotonic(), {}
    for number, name in ((list(STEPS).index(name) + 1, name) for name in chosen(options)):
        if is_done(path, name):
            print(f"step {number}, {name}: done before", flush=True)
            continue
        left = 60 * options.minutes - (time.monotonic() - begin)
        if left <= 0:
            problems[name] = "no time left"
        else:
            print(f"step {number}, {name}", flush=True)
            problem = start_step(options, name, left if options.dry else min(left, STEPS[name].limit_s))
            if problem is not None:
                problems[name] = problem
    for name, problem in problems.items():
        print(f"{name}: {problem}", flush=True)
    if problems:
        raise StoppedEarly(
            f"{len(problems)} steps are not done: the same command continues with them; figures in {path}"
        )
    print(f"all done: {path}")


if __name__ == "__main__":
    run(main)
