"""A study from its file to its report: what is missing is run, on this machine or by SLURM, and all is reported."""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path

from megatron_tpt.config.convert import Converter
from megatron_tpt.errors import Fault, StoppedEarly, UserError, require
from megatron_tpt.files import real_path
from megatron_tpt.jobs import graph as jobs
from megatron_tpt.jobs.lock import exclusive
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.jobs.report import TaskFiles
from megatron_tpt.logs import print_result
from megatron_tpt.names import counted, first_few, shown
from megatron_tpt.studies.costs import Spent, check_budget, costs, longest_chain, refused_recipes, total
from megatron_tpt.studies.expand import Graph, expand
from megatron_tpt.studies.folders import (
    LOGS,
    STATES,
    changed_files,
    inputs_of_last_run,
    is_done,
    place,
    states,
    write_last_run,
)
from megatron_tpt.studies.options import StudyOptions
from megatron_tpt.studies.step import write_spec
from megatron_tpt.studies.study import StudyConfig, load_study
from megatron_tpt.units import duration

logger = logging.getLogger(__name__)

_PROGRAM = "megatron_tpt.studies"
_RESOURCES = (
    "gpus_per_task", "cpus_per_task", "partition", "time_limit", "account", "qos", "mem", "sbatch_args", "env_command",
    "requeue_before_limit_s", "max_requeues",
)  # fmt: skip
"""What `scale` of a step may say; the other options are of the whole study."""


def run_study(options: StudyOptions) -> None:
    """Do what the options say. Raises UserError for mistakes in the study, and a Fault when steps have failed."""
    config, output = load_study(options.study), real_path(options.output)
    require(output.is_dir() or not output.exists(), f"{options.output}: is a file; give a folder for the output")
    is_only_read = options.status or options.report
    try:
        graph = expand(config, inputs_of_last_run(output) if is_only_read else None)
    except UserError as error:
        raise UserError(f"{options.study}: {error}") from None
    other = place(graph, output, "last run" if is_only_read else "any" if options.code == "keep" else "present")
    if options.report:
        _report(config, graph, output)
        return
    if options.status:
        _print_graph(graph)
        _print_failures(graph)
        return
    resources = {name: _resources(options, name, step.scale) for name, step in config.steps.items()}
    if options.dry_run:
        _print_graph(graph)
        _print_refused(graph)
        _print_code(graph, other, options)
    elif options.code == "ask" and other:
        raise UserError(f"{_describe_code(graph, other)}; --code rerun runs them again, --code keep keeps what was run")
    check_budget(graph, config.budget, costs(graph))
    if not options.dry_run:
        with exclusive(output / ".study.lock", f"the study in {output}", timeout_s=10):
            _run_missing(config, graph, options, resources)


def _run_missing(
    config: StudyConfig, graph: Graph, options: StudyOptions, resources: Mapping[str, ScaleOptions]
) -> None:
    output, scale = real_path(options.output), options.scale
    found = states(graph)
    missing = [node for key, node in graph.nodes.items() if found[key] != "done"]
    logger.info(f"{len(missing)} of {counted(len(graph.nodes), 'step')} to run")
    write_last_run(graph, options.study, output)
    names = {node.key: f"{node.name} [{node.key}]" for node in missing}
    nodes = []
    for node in missing:
        write_spec(node)
        command = [sys.executable, "-m", _PROGRAM, str(node.folder)]
        after = [names[key] for key in node.before if key in names]
        nodes.append(jobs.Node(names[node.key], command, node.folder / LOGS, after, resources[node.step]))
    jobs.run_graph(nodes, scale)
    if any(is_done(wanted.node.folder) for wanted in graph.results):
        _report(config, graph, output)
    _raise_unless_done(graph, is_over=scale.executor == "local" or scale.wait)


def _raise_unless_done(graph: Graph, *, is_over: bool) -> None:
    """Raise a Fault for steps that have failed, and StoppedEarly when others are left although the run `is_over`."""
    found = states(graph)
    of_state = {state: [node.name for key, node in graph.nodes.items() if found[key] == state] for state in STATES}
    if failed := of_state["failed"]:
        raise Fault(
            f"{_steps(failed)} failed: {shown(first_few(failed, 5))}; {len(of_state['blocked'])} that need them did "
            f"not run. --status names their logs; the same command runs what is missing"
        )
    if is_over and (left := [*of_state["waiting"], *of_state["running"]]):
        raise StoppedEarly(f"{_steps(left)} stopped before the end: {shown(first_few(left, 5))}; the same command "
                           f"resumes them")  # fmt: skip


def _report(config: StudyConfig, graph: Graph, output: Path) -> None:
    from megatron_tpt.studies.pages import write_study_report  # SciPy takes time to load

    write_study_report(config, graph, output)


def _resources(options: StudyOptions, step: str, given: Mapping[str, object]) -> ScaleOptions:
    """The options of a study with those of a step in their place."""
    for name in given:
        if name not in _RESOURCES:
            raise UserError(f"{options.study}: steps.{step}.scale.{name}: unknown; known are {', '.join(_RESOURCES)}")
    converter = Converter(lambda key: f"{options.study}: steps.{step}.scale: ", lambda key: "")
    own = converter.section(ScaleOptions, given, ())
    converter.raise_problems()
    return replace(options.scale, **{name: getattr(own, name) for name in given})


def _describe_code(graph: Graph, other: Mapping[str, Path]) -> str:
    files = dict.fromkeys(name for key, folder in other.items() for name in changed_files(graph.nodes[key], folder))
    which = f": {shown(first_few(list(files), 5))}" if files else ""
    first = next(iter(other))
    return f"{_steps(other)}, such as {graph.nodes[first].name}, ran with other code{which}"


def _steps(found: Sized) -> str:
    return f"{len(found)} step{'s' * (len(found) != 1)}"


def _print_code(graph: Graph, other: Mapping[str, Path], options: StudyOptions) -> None:
    if other:
        meaning = {"ask": "refused without --code rerun or keep", "keep": "kept", "rerun": "run again"}[options.code]
        print_result(f"{_describe_code(graph, other)}: {meaning}")


def _print_refused(graph: Graph) -> None:
    """A line for each reason why recipes give no cost."""
    names: dict[str, list[str]] = {}
    for name, reason in refused_recipes(graph).items():
        names.setdefault(reason, []).append(name)
    for reason, own in names.items():
        print_result(f"{shown(first_few(own, 1))}: its recipe gives no cost: {shown(reason)}")


def _print_graph(graph: Graph) -> None:
    """A line for every step, with its state, what it costs and what it needs, then the sums."""
    spent, found = costs(graph), states(graph)
    rows = [["step", "state", "tokens", "generated", "FLOPs", "hours", "after"]]
    for key, node in graph.nodes.items():
        after = ", ".join(before.name for before in node.before.values())
        rows.append([node.name, found[key], *_cells(spent[key]), after])
    done = total(spent[key] for key in graph.nodes if found[key] == "done")
    rest = total(spent[key] for key in graph.nodes if found[key] != "done")
    rows += [["done", "", *_cells(done), ""], ["to run", "", *_cells(rest), ""]]
    widths = [max(len(shown(row[place])) for row in rows) for place in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [shown(cell) for cell in row]
        line = [cells[0].ljust(widths[0]), cells[1].ljust(widths[1])]
        line += [cell.rjust(width) for cell, width in zip(cells[2:6], widths[2:], strict=True)]
        print_result("  ".join([*line, cells[6]]).rstrip())
    print_result(", ".join(f"{number} {state}" for state, number in Counter(found.values()).items()))
    chain = longest_chain(graph, {key: Spent() if found[key] == "done" else one for key, one in spent.items()})
    if chain is not None:
        print_result(f"the longest chain of steps to run takes {duration(3600 * chain)}")


def _cells(spent: Spent) -> list[str]:
    forms: Sequence[Callable[[float], str]] = [_count, _count, "{:.3g}".format, "{:.3g}".format]
    return ["?" if value is None else form(value) for form, value in zip(forms, spent.values(), strict=True)]


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e6 else f"{number:.4g}"


def _print_failures(graph: Graph) -> None:
    for key, state in states(graph).items():
        if state == "failed":
            node = graph.nodes[key]
            files = TaskFiles(node.folder / LOGS, 0)
            print_result(f"{shown(node.name)} failed: {shown(files.user_error())}; log {shown(files.log)}")
