"""The report of a study, made from the folders of its steps alone: the same folders give the same files.

OUTPUT/report/results.csv                          the long table: a row per figure, with its file
              means.csv differences.csv interactions.csv claims.csv
              METRIC-X.png                         the means against tokens, FLOPs, or the factor x
              report.md report.html                all of it, and where every figure is from
"""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write
from megatron_tpt.jobs.slurm_tasks import ranges
from megatron_tpt.logs import print_result
from megatron_tpt.names import counted, first_few, shown
from megatron_tpt.rich_text import plotted
from megatron_tpt.studies.claims import judge
from megatron_tpt.studies.comparison import Comparison, Estimate
from megatron_tpt.studies.costs import Spent, cost_of_result, costs, total
from megatron_tpt.studies.expand import Graph
from megatron_tpt.studies.folders import codes_of, done_record, is_done
from megatron_tpt.studies.render import Block, Heading, Picture, Table, write_pages
from megatron_tpt.studies.study import ReportConfig, StudyConfig, as_number
from megatron_tpt.studies.table import Row, collect

_COSTS = ("trained_tokens", "generated_tokens", "flops", "hours")
_METHOD = (
    "n: levels of {replicate}. Intervals: 95 %, Student's t over {replicate}; with one, over the problems (Wilson, "
    "Newcombe) where their number is known. Differences are paired by {replicate}; (mean): averaged over the levels of "
    "the factor. p: two-sided t test, adjusted over its table (Benjamini-Hochberg). Rows: those of results.csv, and of "
    "the table of sources, that a figure is from."
)

_CLAIMS = (
    "A claim holds when the whole interval of its difference is in the claimed range, does not hold when it is outside "
    "and is not decided when it is in part. The intervals are not adjusted for the number of claims."
)


def write_study_report(config: StudyConfig, graph: Graph, output: Path) -> None:
    """Write OUTPUT/report, and print where it is and the means. Raises UserError when no step has results yet."""
    rows, missing = collect(graph)
    if not rows:
        raise UserError(f"{output}: no step has results yet; --status says what has run")
    folder = output / "report"
    found = {metric: Comparison(rows, metric, config.report) for metric in dict.fromkeys(row.metric for row in rows)}
    blocks: list[Block] = [Heading(1, config.title)]
    if missing:
        names = first_few([wanted.node.name for wanted in missing], 5)
        blocks.append(f"Not complete: {len(missing)} of {counted(len(graph.results), 'result')} missing ({names}).")
    else:
        _check_baseline(config.report, rows)
    tables: dict[str, list[list[str]]] = {"means": [], "differences": [], "interactions": [], "claims": []}
    for metric, comparison in found.items():
        blocks += _of_metric(metric, comparison, folder, config.report, tables)
    blocks += [
        _METHOD.format(replicate=config.report.replicate),
        *_cost_blocks(graph),
        *_source_blocks(graph, rows, output),
    ]
    _write_csv(folder / "results.csv", _long_table(rows, output))
    for name, lines in tables.items():
        if lines or name != "claims":
            _write_csv(folder / f"{name}.csv", lines)
    write_pages(folder, "report", blocks)
    for comparison in found.values():
        for one in comparison.means():
            name = shown(f"{comparison.metric}  {', '.join(one.what.values())}")
            print_result(f"{name}: {_interval(one)}  (n = {one.num_replicates})")
    print_result(f"report: {folder / 'report.md'}, {folder / 'report.html'}")


def _check_baseline(config: ReportConfig, rows: Sequence[Row]) -> None:
    for factor, level in config.baseline.items():
        if not any(row.levels.get(factor) == level for row in rows):
            raise UserError(f"report.baseline: {factor}: {level}: no result has that level")


def _of_metric(
    metric: str, comparison: Comparison, folder: Path, config: ReportConfig, tables: dict[str, list[list[str]]]
) -> list[Block]:
    """The section of a metric; its tables are added to `tables`, its pictures written."""
    blocks: list[Block] = [Heading(2, metric), *_claim_blocks(metric, comparison, config, tables["claims"])]
    for name, estimates, has_p in (
        ("means", comparison.means(), False),
        ("differences", comparison.differences(), True),
        ("interactions", comparison.interactions(), True),
    ):
        if not estimates:
            continue
        header = [*comparison.factors, "mean", "95 % interval", "n", *(["p"] if has_p else []), "rows"]
        lines = [
            [*one.what.values(), _number(one.mean), _bounds(one), str(one.num_replicates),
             *([_number(one.p)] if has_p else []), ranges(one.rows)]
            for one in estimates
        ]  # fmt: skip
        blocks += [Heading(3, name), Table(header, lines)]
        tables[name] += (
            [] if tables[name] else [["metric", *comparison.factors, "mean", "low", "high", "n", "p", "rows"]]
        )
        tables[name] += [
            [metric, *one.what.values(), *map(_exact, (one.mean, one.low, one.high)), str(one.num_replicates),
             _exact(one.p), " ".join(map(str, one.rows))]
            for one in estimates
        ]  # fmt: skip
    for x in [config.x] if config.x else ["tokens", "FLOPs"]:
        if points := _points(comparison, x):
            name = re.sub(r"[^A-Za-z0-9]+", "-", f"{metric}-{x}").strip("-") + ".png"
            with atomic_write(folder / name) as temporary:
                _plot(temporary, comparison, config, x, points)
            blocks.append(Picture(name, f"{metric} against {x}"))
    return blocks


def _claim_blocks(metric: str, comparison: Comparison, config: ReportConfig, lines: list[list[str]]) -> list[Block]:
    """What is to be shown, and whether it is; `lines` are those of claims.csv."""
    judged = judge(comparison, config.claims)
    if not judged:
        return []
    rows = []
    for one in judged:
        found, (above, below) = one.difference, (one.claim.above, one.claim.below)
        limits = f"more than {above:g}" if math.isinf(below) else f"more than {above:g}, at most {below:g}"
        cells = ["no results", "", "0", ""]
        exact = ["", "", "", "0", ""]
        if found is not None:
            count, numbers = str(found.num_replicates), " ".join(map(str, found.rows))
            cells = [_number(found.mean), _bounds(found), count, ranges(found.rows)]
            exact = [*map(_exact, (found.mean, found.low, found.high)), count, numbers]
        rows.append([one.claim.text, one.verdict, limits, *cells])
        lines += [] if lines else [["metric", "claim", "verdict", "above", "below", "mean", "low", "high", "n", "rows"]]
        lines.append([metric, one.claim.text, one.verdict, _exact(above), "" if math.isinf(below) else _exact(below),
                      *exact])  # fmt: skip
    return [
        Heading(3, "claims"), _CLAIMS,
        Table(["claim", "verdict", "claimed difference", "difference", "95 % interval", "n", "rows"], rows),
    ]  # fmt: skip


def _points(comparison: Comparison, x: str) -> dict[str, list[tuple[float, Estimate]]]:
    """Line: its points in the order of x. `x` is a factor, or what the results took; empty where that is not known."""
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for one in comparison.means():
        if x not in ("tokens", "FLOPs"):
            if not one.what.get(x):  # a result that does not have this factor
                continue
            place = as_number(one.what[x], x)
        else:
            spent = [comparison.rows[number].spent for number in one.rows]
            values = [each.all_tokens if x == "tokens" else each.flops for each in spent]
            if not all(values):
                return {}
            place = math.fsum(value or 0.0 for value in values) / len(values)
        name = ", ".join(level for factor, level in one.what.items() if factor != x and level)
        lines.setdefault(name, []).append((place, one))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def _plot(
    path: Path,
    comparison: Comparison,
    config: ReportConfig,
    x: str,
    lines: Mapping[str, Sequence[tuple[float, Estimate]]],
) -> None:
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, points in lines.items():
        errors = [
            [one.mean - (one.mean if one.low is None else one.low) for _, one in points],
            [(one.mean if one.high is None else one.high) - one.mean for _, one in points],
        ]
        places, means = [place for place, _ in points], [one.mean for _, one in points]
        axes.errorbar(places, means, errors, marker="o", capsize=3, label=plotted(name or comparison.metric))
    if comparison.metric in config.chance:
        axes.axhline(config.chance[comparison.metric], color="grey", linestyle=":", label="chance")
    whole = "" if x in comparison.factors else ", all steps before and generation included"
    axes.set(xlabel=plotted(f"{x}{whole}"), ylabel=plotted(comparison.metric))
    if len(lines) <= 20:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})
    pyplot.close(figure)


def _cost_blocks(graph: Graph) -> list[Block]:
    """What every step took, and what a result did."""
    found = costs(graph)
    steps: dict[str, list[Spent]] = {}
    for key, node in graph.nodes.items():
        steps.setdefault(node.step, []).append(found[key])
    lines = [[step, str(len(spent)), *_spent(total(spent))] for step, spent in steps.items()]
    lines.append(["all", str(len(graph.nodes)), *_spent(total(found.values()))])
    own = [[", ".join(wanted.levels.values()), *_spent(cost_of_result(wanted, found))] for wanted in graph.results]
    return [
        Heading(2, "Cost"),
        "Measured where a step has run and says it, planned elsewhere; nothing where neither says anything.",
        Table(["step", "runs", *_COSTS], lines), "What a result took, with all steps before it:",
        Table(["result", *_COSTS], own),
    ]  # fmt: skip


def _spent(spent: Spent) -> list[str]:
    return ["unknown" if value is None else _number(value) for value in spent.values()]


def _source_blocks(graph: Graph, rows: Sequence[Row], output: Path) -> list[Block]:
    """The file of every row, and how every step ran."""
    files: dict[tuple[Path, str, str], list[int]] = {}
    for number, row in enumerate(rows, start=1):
        files.setdefault((row.source, row.checksum, row.step), []).append(number)
    sources = [
        [str(path.relative_to(output)), step, ranges(numbers), checksum]
        for (path, checksum, step), numbers in files.items()
    ]
    runs = []
    for node in graph.nodes.values():
        record: dict[str, Any] = done_record(node)
        revision = str(record.get("revision") or "unknown")
        runs.append(
            [str(node.folder.relative_to(output)), record.get("ended", "not done"), str(record.get("attempts", "")),
             record.get("host", ""), revision[:12] + ("+changes" if revision.endswith("+changes") else "")]
        )  # fmt: skip
    return [
        Heading(2, "Sources"), Table(["file", "step", "rows", "checksum"], sources),
        Heading(2, "Steps"), "The names end in the key of the settings and the key of the code; step.json in each has "
        "the command, its inputs and its code.", Table(["folder", "ended", "attempts", "host", "revision"], runs),
        *_mixed_code(graph),
    ]  # fmt: skip


def _mixed_code(graph: Graph) -> list[Block]:
    """Which files were not the same in all steps that have run."""
    digests: dict[str, set[str]] = {}
    for node in graph.nodes.values():
        for code in codes_of(node.folder) if is_done(node.folder) else []:
            for name, digest in code.items():
                digests.setdefault(name, set()).add(digest)
    if mixed := sorted(name for name, found in digests.items() if len(found) > 1):
        return [f"Steps ran with different versions of {first_few(mixed, 10)}."]
    return []


def _long_table(rows: Sequence[Row], output: Path) -> list[list[str]]:
    header = ["row", *rows[0].levels, "metric", "value", "trials", *_COSTS, "source", "checksum"]
    return [header] + [
        [str(number), *row.levels.values(), row.metric, _exact(row.value), str(row.trials or ""),
         *map(_exact, row.spent.values()), str(row.source.relative_to(output)), row.checksum]
        for number, row in enumerate(rows, start=1)
    ]  # fmt: skip


def _write_csv(path: Path, lines: Sequence[Sequence[str]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def _exact(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _bounds(one: Estimate) -> str:
    return "" if one.low is None else f"[{_number(one.low)}, {_number(one.high)}]"


def _interval(one: Estimate) -> str:
    return f"{_number(one.mean)} {_bounds(one)}".strip()
