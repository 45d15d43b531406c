"""Recurrent models over the depth at which they are evaluated: a table and a picture.

OUTPUT/recurrences.md    a row per model and number of iterations r
OUTPUT/recurrences.png   scores against r, against unrolled parameters and, where given, against training FLOPs
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_tpt.evaluation.arms import Arm
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.files import atomic_write
from megatron_tpt.generation import weight_shapes
from megatron_tpt.logs import print_result
from megatron_tpt.markdown import table
from megatron_tpt.rich_text import plotted

_LAYER = re.compile(r"model\.(layers|prelude|block|coda)\.")
_Draw = Callable[[Any, Sequence["Point"], str], None]


@dataclass(frozen=True)
class Score:
    """The figure of an arm on one benchmark."""

    kind: Literal["accuracy", "perplexity"]
    value: float | None
    """None where documents could not be scored."""
    stderr: float | None = None
    """Of the accuracy."""
    mean_depth: float | None = None
    """With early exit, iterations per generated token; at most r."""


@dataclass(frozen=True)
class Point:
    """What a model reached with r iterations."""

    model: str
    name: str
    """A short name of the model."""
    recurrences: int | None
    """r; None for a model that is not recurrent."""
    unrolled_parameters: int
    """Parameters of the layers, those of the recurrent ones counted once per iteration."""
    training_flops: float | None
    scores: dict[str, Score]
    """By benchmark; all points have the same ones."""


def points(
    arms: Sequence[Arm],
    options: EvaluateOptions,
    results: Sequence[Mapping[str, Any]],
    documents: Sequence[Mapping[str, Any]],
) -> list[Point]:
    """A point for every arm, from the lists `models` and `documents` of results.json."""
    scores: dict[tuple[str, int | None], dict[str, Score]] = {(arm.model, arm.recurrences): {} for arm in arms}
    for one in results:
        score = Score("accuracy", one["accuracy"], one["stderr"], one["mean_depth"])
        scores[one["model"], one["recurrences"]][one["benchmark"]] = score
    for one in documents:
        scores[one["model"], one["recurrences"]][one["benchmark"]] = Score("perplexity", one["perplexity"])
    flops = dict(zip(options.model, options.training_flops, strict=False))  # none, or one for each
    return [
        Point(
            arm.model,
            arm.name,
            arm.recurrences,
            unrolled_parameters(weight_shapes(arm.model), arm.recurrences),
            flops.get(arm.model),
            scores[arm.model, arm.recurrences],
        )
        for arm in arms
    ]


def unrolled_parameters(shapes: Mapping[str, tuple[int, ...]], recurrences: int | None) -> int:
    """Parameters of the layers of a Hugging Face folder with these tensors, with recurrent ones counted once per
    iteration; without embedding, adapter, final norm and output matrix (RecurrentConfig.unrolled_parameters)."""
    parts = [(match[1], shape) for name, shape in shapes.items() if (match := _LAYER.match(name))]
    return sum(math.prod(shape) * ((recurrences or 1) if part == "block" else 1) for part, shape in parts)


def write_report(folder: Path, found: Sequence[Point]) -> None:
    """Print the table, and write it and the picture into `folder`."""
    text = table(*rows(found))
    print_result(text)
    with atomic_write(folder / "recurrences.md") as temporary:
        temporary.write_text(f"# Scores over the number of iterations\n\n{text}\n", encoding="utf-8")
    with atomic_write(folder / "recurrences.png") as temporary:
        _plot(temporary, found)


def rows(found: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """The header and a row per point, without the columns that no point has."""
    columns: dict[str, Callable[[Point], str | None]] = {
        "model": lambda one: one.name,
        "r": lambda one: "-" if one.recurrences is None else str(one.recurrences),
        "parameters, unrolled": lambda one: f"{one.unrolled_parameters:,}",
        "training FLOPs": lambda one: _number(one.training_flops, ".3e"),
    }
    cells = {name: [value(point) for point in found] for name, value in columns.items()}
    for name, first in found[0].scores.items():
        scores = [point.scores[name] for point in found]
        unit = " in %" if first.kind == "accuracy" else ""
        cells[f"{name}: {first.kind}{unit}"] = [_cell(score) for score in scores]
        cells[f"{name}: iterations per token"] = [_number(score.mean_depth, ".2f") for score in scores]
    kept = {name: column for name, column in cells.items() if any(cell is not None for cell in column)}
    return list(kept), [[cell or "" for cell in row] for row in zip(*kept.values(), strict=True)]


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _cell(score: Score) -> str | None:
    if score.kind == "perplexity" or score.value is None:
        return _number(score.value, ".4f")
    error = "" if score.stderr is None else f" ± {100 * score.stderr:.1f}"
    return f"{100 * score.value:.1f}{error}"


def _plot(path: Path, found: Sequence[Point]) -> None:
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a display
    from matplotlib import pyplot

    scores = found[0].scores
    panels: list[_Draw] = [_against_depth, _against_parameters]
    if any(point.training_flops is not None for point in found):
        panels.append(_against_flops)
    size = (5 * len(panels), 4 * len(scores))
    figure, grid = pyplot.subplots(len(scores), len(panels), squeeze=False, figsize=size, layout="constrained")
    for line, (name, score) in zip(grid, scores.items(), strict=True):
        for axes, draw in zip(line, panels, strict=True):
            draw(axes, found, name)
            axes.set_ylabel(plotted(f"{name}: {score.kind}"))
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def _by_model(found: Sequence[Point]) -> dict[str, list[Point]]:
    models: dict[str, list[Point]] = {}
    for point in found:
        models.setdefault(point.name, []).append(point)
    return models


def _value(point: Point, name: str) -> float:
    value = point.scores[name].value
    return math.nan if value is None else value


def _line(axes: Any, found: Sequence[Point], x: str, name: str, label: str) -> None:
    """A line through points, with 95 % intervals of accuracies."""
    errors = [1.96 * (point.scores[name].stderr or 0.0) for point in found]
    values = [_value(point, name) for point in found]
    axes.errorbar([getattr(point, x) for point in found], values, errors, marker="o", capsize=3, label=plotted(label))


def _against_depth(axes: Any, found: Sequence[Point], name: str) -> None:
    for model, own in _by_model(found).items():
        if own[0].recurrences is None:
            axes.axhline(_value(own[0], name), color="grey", linestyle="--", label=plotted(model))
        else:
            _line(axes, own, "recurrences", name, model)
    depths = sorted({point.recurrences for point in found if point.recurrences is not None})
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.set_xlabel("iterations r")


def _against_parameters(axes: Any, found: Sequence[Point], name: str) -> None:
    for model, own in _by_model(found).items():
        _line(axes, own, "unrolled_parameters", name, model)
    axes.set_xscale("log")
    axes.set_xlabel("unrolled parameters of the layers")


def _against_flops(axes: Any, found: Sequence[Point], name: str) -> None:
    """A line per r through the models, and a point for every model that is not recurrent."""
    groups: dict[str, list[Point]] = {}
    for point in found:
        groups.setdefault(point.name if point.recurrences is None else f"r = {point.recurrences}", []).append(point)
    for label, own in groups.items():
        _line(axes, sorted(own, key=lambda point: point.training_flops or 0.0), "training_flops", name, label)
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs")
