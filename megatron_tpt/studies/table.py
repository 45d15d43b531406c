"""The long table of a study's results: a row per combination of levels, seed and metric, with the file it is from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.files import file_checksum
from megatron_tpt.json_data import read_json
from megatron_tpt.names import counted, first_few
from megatron_tpt.studies.costs import Spent, cost_of_result, costs
from megatron_tpt.studies.expand import Graph, Node, Wanted
from megatron_tpt.studies.folders import is_done
from megatron_tpt.studies.measured import number_at, value_at
from megatron_tpt.studies.study import Results


@dataclass(frozen=True)
class Row:
    """A figure."""

    levels: dict[str, str]
    """Of all factors, those in the file included."""
    metric: str
    value: float
    trials: int | None
    """Problems that it is a share of."""
    spent: Spent
    """What it took, with all steps before it."""
    source: Path
    """The file, in the study's folder."""
    checksum: str
    """Of the file."""
    step: str
    """The step that wrote it."""


def collect(graph: Graph) -> tuple[list[Row], list[Wanted]]:
    """All rows that there are, in the order of the study, and the results that are missing.

    Raises UserError for a file without what the study says is in it.
    """
    found = costs(graph)
    rows: list[Row] = []
    missing: list[Wanted] = []
    for wanted in graph.results:
        if is_done(wanted.node.folder):
            rows += _rows(wanted, cost_of_result(wanted, found))
        else:
            missing.append(wanted)
    factors = list(dict.fromkeys(name for row in rows for name in row.levels))
    return [_with_all(row, factors) for row in rows], missing


def _with_all(row: Row, factors: list[str]) -> Row:
    """Where steps leave results of different factors, a row has "" for those that it does not have."""
    levels = {name: row.levels.get(name, "") for name in factors}
    return Row(levels, row.metric, row.value, row.trials, row.spent, row.source, row.checksum, row.step)


def _rows(wanted: Wanted, spent: Spent) -> Iterator[Row]:
    node, results = wanted.node, wanted.node.config.results
    assert results is not None
    path = node.output / results.file
    try:
        content = read_json(path)
        checksum = file_checksum(path)
    except OSError as error:
        raise UserError(f"{path}: no results there ({error.strerror}); correct results.file of {node.step}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    for item in _items(node, results, content, path, wanted.levels):
        levels = wanted.levels | {name: _level(item, name, path) for name in results.factors}
        for metric, keys in results.metrics.items():
            value, trials = number_at(item, keys, path), None
            if metric in results.trials:
                trials = round(number_at(item, results.trials[metric], path))
                if not (0 <= value <= 1 and trials > 0):
                    raise UserError(f"{path}: {metric} is {value:g} of {trials} problems, and no share of them: "
                                    f"correct results.trials of {node.step}")  # fmt: skip
            yield Row(levels, metric, value, trials, spent, path, checksum, node.step)


def _items(node: Node, results: Results, content: Any, path: Path, levels: Mapping[str, str]) -> list[Any]:
    """The rows of a file that belong to a combination of levels."""
    if results.rows is None:
        return [content]
    items = value_at(content, results.rows, path)
    if not isinstance(items, list):
        raise UserError(f"{path}: {results.rows or 'the file'} is no list of rows")
    if not node.rows_of:
        return items
    if len(items) != len(node.rows_of):
        names = first_few(node.config.over, 3)
        rows_there = counted(len(items), "row")
        raise UserError(f"{path}: {rows_there}, and {len(node.rows_of)} combinations of {names}: each has one row")
    rows = zip(items, node.rows_of, strict=True)
    return [item for item, of in rows if any(own.items() <= levels.items() for own in of)]


def _level(item: Any, name: str, path: Path) -> str:
    value = value_at(item, name, path)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{path}: {name} is {value!r}, and a level is due: a text or a number")
    return str(value)
