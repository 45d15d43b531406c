"""Recurrent models over the depth at which they are evaluated: a table and a picture.

OUTPUT/recurrences.md    a row per model and number of iterations r
OUTPUT/recurrences.png   scores against r, against unrolled parameters and, where given, against training FLOPs
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tpt.files import atomic_write
from megatron_tpt.logs import print_result
from megatron_tpt.markdown import table
from megatron_tpt.rich_text import plotted

_LAYER = re.compile(r"model\.(layers|prelude|block|coda)\.")
_SCORES = {"accuracy": "accuracy", "perplexity": "perplexity of documents"}
_Draw = Callable[[Any, Sequence["Point"], str], None]


@dataclass(frozen=True)
class Point:
    """What a model reached with r iterations."""

    model: str
    recurrences: int | None
    """r; None for a model that is not recurrent."""
    unrolled_parameters: int
    """Parameters of the layers, those of the recurrent ones counted once per iteration."""
    training_flops: float | None
    accuracy: float | None
    stderr: float | None
    """Of the accuracy."""
    mean_depth: float | None
    """With early exit, iterations per generated token; at most r."""
    perplexity: float | None


def unrolled_parameters(shapes: Mapping[str, tuple[int, ...]], recurrences: int | None) -> int:
    """Parameters of the layers of a Hugging Face folder with these tensors, with recurrent ones counted once per
    iteration; without embedding, adapter, final norm and output matrix (RecurrentConfig.unrolled_parameters)."""
    parts = [(match[1], shape) for name, shape in shapes.items() if (match := _LAYER.match(name))]
    return sum(math.prod(shape) * ((recurrences or 1) if part == "block" else 1) for part, shape in parts)


def write_report(folder: Path, points: Sequence[Point]) -> None:
    """Print the table, and write it and the picture into `folder`."""
    text = table(*rows(points))
    print_result(text)
    with atomic_write(folder / "recurrences.md") as temporary:
        temporary.write_text(f"# Scores over the number of iterations\n\n{text}\n", encoding="utf-8")
    with atomic_write(folder / "recurrences.png") as temporary:
        _plot(temporary, points)


def rows(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """The header and a row per point, without the columns that no point has."""
    columns: dict[str, Callable[[Point], str | None]] = {
        "model": lambda one: one.model,
        "r": lambda one: "-" if one.recurrences is None else str(one.recurrences),
        "parameters, unrolled": lambda one: f"{one.unrolled_parameters:,}",
        "training FLOPs": lambda one: _number(one.training_flops, ".3e"),
        "accuracy in %": lambda one: _percent(one.accuracy, one.stderr),
        "iterations per token": lambda one: _number(one.mean_depth, ".2f"),
        "perplexity": lambda one: _number(one.perplexity, ".4f"),
    }
    cells = {name: [value(point) for point in points] for name, value in columns.items()}
    kept = {name: column for name, column in cells.items() if any(cell is not None for cell in column)}
    return list(kept), [[cell or "" for cell in row] for row in zip(*kept.values(), strict=True)]


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _percent(value: float | None, stderr: float | None) -> str | None:
    error = "" if stderr is None else f" ± {100 * stderr:.1f}"
    return None if value is None else f"{100 * value:.1f}{error}"


def _plot(path: Path, points: Sequence[Point]) -> None:
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a display
    from matplotlib import pyplot

    scores = [name for name in _SCORES if any(getattr(point, name) is not None for point in points)]
    panels: list[_Draw] = [_against_depth, _against_parameters]
    if any(point.training_flops is not None for point in points):
        panels.append(_against_flops)
    size = (5 * len(panels), 4 * len(scores))
    figure, grid = pyplot.subplots(len(scores), len(panels), squeeze=False, figsize=size, layout="constrained")
    for line, score in zip(grid, scores, strict=True):
        for axes, draw in zip(line, panels, strict=True):
            draw(axes, points, score)
            axes.set_ylabel(_SCORES[score])
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def _by_model(points: Sequence[Point]) -> dict[str, list[Point]]:
    models: dict[str, list[Point]] = {}
    for point in points:
        models.setdefault(point.model, []).append(point)
    return models


def _line(axes: Any, points: Sequence[Point], x: str, score: str, label: str) -> None:
    """A line through points, with 95 % intervals of accuracies."""
    errors = [1.96 * (point.stderr or 0.0) if score == "accuracy" else 0.0 for point in points]
    values = [getattr(point, score) for point in points]
    axes.errorbar([getattr(point, x) for point in points], values, errors, marker="o", capsize=3, label=plotted(label))


def _against_depth(axes: Any, points: Sequence[Point], score: str) -> None:
    for model, own in _by_model(points).items():
        if own[0].recurrences is None:
            axes.axhline(getattr(own[0], score), color="grey", linestyle="--", label=plotted(model))
        else:
            _line(axes, own, "recurrences", score, model)
    depths = sorted({point.recurrences for point in points if point.recurrences is not None})
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.set_xlabel("iterations r")


def _against_parameters(axes: Any, points: Sequence[Point], score: str) -> None:
    for model, own in _by_model(points).items():
        _line(axes, own, "unrolled_parameters", score, model)
    axes.set_xscale("log")
    axes.set_xlabel("unrolled parameters of the layers")


def _against_flops(axes: Any, points: Sequence[Point], score: str) -> None:
    """A line per r through the models, and a point for every model that is not recurrent."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.model if point.recurrences is None else f"r = {point.recurrences}", []).append(point)
    for label, own in groups.items():
        _line(axes, sorted(own, key=lambda point: point.training_flops or 0.0), "training_flops", score, label)
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs")
