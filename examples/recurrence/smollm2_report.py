"""Losses against steps of the runs of smollm2.sh, as a table and a picture, with the versions and the machine.

python examples/recurrence/smollm2_report.py --output OUTPUT_DIR

Writes losses.json, losses.md and losses.png there.
"""

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_tpt.config.cli import parse, run
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write, write_json
from megatron_tpt.logs import print_result
from megatron_tpt.markdown import table

PREFIX = "depth_validation_loss/"
STATIC = "static"


@dataclass(frozen=True)
class ReportOptions:
    """What to report."""

    output: Path
    """The folder that smollm2.sh has written."""


def read_losses(run_folder: Path) -> dict[str, dict[int, float]]:
    """Depth -> step -> validation loss. Raises UserError when the run has none."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    losses: dict[str, dict[int, float]] = {}
    for row in map(json.loads, lines):
        for name in row:
            if name.startswith(PREFIX):
                losses.setdefault(name.removeprefix(PREFIX), {})[row["step"]] = row[name]
    if not losses:
        raise UserError(f"{run_folder}: no validation losses there; did its training end well?")
    return losses


def curves_of(output: Path) -> dict[str, dict[int, float]]:
    """Curve -> step -> loss: a curve for every depth, and one for the static model."""
    curves = {f"r = {depth}": losses for depth, losses in read_losses(output / "recurrent").items()}
    [static] = read_losses(output / STATIC).values()
    return curves | {STATIC: static}


def environment() -> dict[str, Any]:
    """The software and the machine."""
    return {
        "versions": {name: version(name) for name in ("megatron-tpt", "torch", "megatron-core")},
        "machine": {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))},
    }


def plot(path: Path, curves: dict[str, dict[int, float]]) -> None:
    """A line per curve."""
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, losses in curves.items():
        axes.plot(
            list(losses), list(losses.values()), marker="o", linestyle="--" if name == STATIC else "-", label=name
        )
    axes.set(xlabel="steps of healing", ylabel="validation loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def main() -> None:
    options = parse(ReportOptions, description=__doc__)
    curves = curves_of(options.output)
    steps = sorted({step for losses in curves.values() for step in losses})
    rows = [
        [str(step), *(f"{losses[step]:.4f}" if step in losses else "" for losses in curves.values())] for step in steps
    ]
    about = environment()
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    page = f"{table(['step', *curves], rows)}\n\n{versions}; {about['machine']['cores']} cores\n"
    write_json(options.output / "losses.json", {"losses": curves, **about})
    with atomic_write(options.output / "losses.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    with atomic_write(options.output / "losses.png") as temporary:
        plot(temporary, curves)
    print_result(page, end="")


if __name__ == "__main__":
    run(main)
