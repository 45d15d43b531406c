"""The report of the miniature, over one seed or several: accuracy, tokens of thinking, J, and what REPRO beats.

python examples/repro_demo/repro_report.py --results MEASURED/policies.json ... --output FOLDER

Every sentence follows from the figures. Writes report.md, report.json and curves.png.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from parcels import LENGTHS
from repro_claims import METRICS, PAIRS, Comparison, Estimate, Policy, compare_all, estimate, read_policies

from megatron_tpt.config.cli import parse, run
from megatron_tpt.files import atomic_write, write_json
from megatron_tpt.logs import print_result
from megatron_tpt.markdown import table

VERDICTS = ("beats", "does not beat", "is beaten by")


@dataclass(frozen=True)
class ReportOptions:
    """Which results to report on."""

    results: list[Path]
    """policies.json of measure_policies.py, of every seed."""
    output: Path
    """The folder for the report."""


def by_arm(policies: Sequence[Policy]) -> dict[str, list[Policy]]:
    """The policies of every arm, in the order in which arms were measured."""
    arms: dict[str, list[Policy]] = {}
    for one in policies:
        arms.setdefault(one.arm, []).append(one)
    return arms


def _percent(found: Estimate) -> str:
    low, high = max(found.low, 0), min(found.high, 1)
    return f"{100 * found.mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _number(found: Estimate) -> str:
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def arms_table(policies: Sequence[Policy]) -> str:
    """A row per arm."""
    rows = []
    for arm, own in by_arm(policies).items():
        accuracy, extra, early = (
            estimate([one.of_problems(metric) for one in own]) for metric in ("accuracy", "extra_tokens", "early")
        )
        rows.append([arm, str(len(own)), _percent(accuracy), _number(extra), _percent(early)])
    return table(["arm", "seeds", "accuracy in %", "tokens beyond the minimum", "steps are missing, in %"], rows)


def lengths_table(policies: Sequence[Policy], metric: str, form: Callable[[Estimate], str]) -> str:
    """A row per arm, a column per number of legs."""
    rows = [
        [arm, *(form(estimate([one.of_problems(metric, legs) for one in own])) for legs in LENGTHS)]
        for arm, own in by_arm(policies).items()
    ]
    return table(["arm", *(f"{legs} legs" for legs in LENGTHS)], rows)


def curve(policies: Sequence[Policy]) -> list[Estimate]:
    """J of an arm after 0, 1, ... steps."""
    points = range(len(policies[0].curves[0]))
    return [estimate([[each[point] for each in one.curves] for one in policies]) for point in points]


def curves_table(policies: Sequence[Policy]) -> str:
    """A row per arm, a column per number of steps."""
    curves = {arm: curve(own) for arm, own in by_arm(policies).items()}
    rows = [[arm, *(f"{point.mean:.2f}" for point in points)] for arm, points in curves.items()]
    return table(["J after steps", *map(str, range(len(rows[0]) - 1))], rows)


def _difference(one: Comparison) -> str:
    factor, unit = (100, " points") if one.metric == "accuracy" else (1, "")
    mean, low, high = (factor * value for value in (one.difference.mean, one.difference.low, one.difference.high))
    return f"{mean:+.2f}{unit} [{low:+.2f}, {high:+.2f}]"


def verdict_lines(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """A line for every pair of arms, and one that names what is not beaten in each metric."""
    for arm, other in PAIRS:
        own = [one for one in comparisons if (one.arm, one.other) == (arm, other)]
        if own:
            parts = "; ".join(f"{METRICS[one.metric][0]}: {one.verdict} it, {_difference(one)}" for one in own)
            seeds = f"{own[0].num_seeds} seed{'s' * (own[0].num_seeds > 1)}"
            yield f"- {arm} against {other} ({seeds}): {parts}"
    for metric, (name, _) in METRICS.items():
        for verdict in VERDICTS:
            found = [one for one in comparisons if one.metric == metric and one.verdict == verdict]
            of_grpo = [one.other for one in found if one.arm == "REPRO"]
            if of_grpo:
                yield f"- **In {name}, REPRO {verdict}: {', '.join(of_grpo)}.**"


def as_markdown(policies: Sequence[Policy], comparisons: Sequence[Comparison]) -> str:
    """The page."""
    seeds = sorted({one.seed for one in policies})
    several = len(seeds) > 1
    interval = "over the seeds (Student's t; over the problems where an arm has one seed)" if several else (
        "over the problems, of one seed: another may differ by more")  # fmt: skip
    num_problems = len(policies[0].problems)
    return "\n\n".join(
        [
            "# REPRO in miniature",
            f"{num_problems} held-out problems of {LENGTHS[0]} to {LENGTHS[-1]} legs, answered at temperature 1. "
            f"Seeds: {', '.join(map(str, seeds))}. In brackets: 95 % interval {interval}. The minimum is a step for "
            f"every leg; steps are missing where thinking lacks the step of a leg.",
            arms_table(policies),
            "## What REPRO beats",
            "Differences on the same problems, REPRO minus the other arm. An arm beats another where the whole "
            "interval is on its side of 0, and does not beat it where the interval contains 0.",
            "\n".join(verdict_lines(comparisons)),
            "## Accuracy in % by needed length",
            lengths_table(policies, "accuracy", _percent),
            "## Tokens of thinking beyond the minimum by needed length",
            lengths_table(policies, "extra_tokens", _number),
            f"## J along right thinking, {LENGTHS[-1]} legs",
            curves_table(policies),
            "![J after steps of right thinking](curves.png)",
        ]
    ) + "\n"  # fmt: skip


def write_repro_report(folder: Path, paths: Sequence[Path]) -> None:
    """Write report.md, report.json and curves.png, and print the page."""
    policies = read_policies(paths)
    comparisons = compare_all(policies)
    arms = by_arm(policies)
    content = {
        "arms": {
            arm: {metric: asdict(estimate([one.of_problems(metric) for one in own])) for metric in METRICS}
            for arm, own in arms.items()
        },
        "curves": {arm: list(map(asdict, curve(own))) for arm, own in arms.items()},
        "comparisons": list(map(asdict, comparisons)),
    }
    write_json(folder / "report.json", content)
    page = as_markdown(policies, comparisons)
    with atomic_write(folder / "report.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    with atomic_write(folder / "curves.png") as temporary:
        _plot(temporary, {arm: curve(own) for arm, own in arms.items()})
    print_result(page, end="")


def _plot(path: Path, curves: dict[str, list[Estimate]]) -> None:
    """J against the steps of right thinking, a line with its interval per arm."""
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (arm, points) in enumerate(curves.items()):
        steps = range(len(points))
        axes.plot(steps, [one.mean for one in points], marker="o", markersize=3, color=f"C{number}", label=arm)
        axes.fill_between(
            steps, [one.low for one in points], [one.high for one in points], color=f"C{number}", alpha=0.1
        )
    axes.set(xlabel="steps of right thinking", ylabel="J: mean log-probability of the right answer (nats)")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    run(lambda: write_repro_report((options := parse(ReportOptions, description=__doc__)).output, options.results))
