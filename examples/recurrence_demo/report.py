"""The report of the miniature, over one seed or several: accuracy by depth, by doors, and which claims hold.

python examples/recurrence_demo/report.py --results RUN/report/results.json ... --output FOLDER

Every sentence follows from the figures. Writes report.md, report.json and depth.png.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from arms import ALL_ARMS, DEPTHS, RECURRENT, Arm
from claims import CLOSE, FAR, Verdict, judge_all
from house import LENGTHS, ROOMS

from megatron_tpt.config.cli import parse, run
from megatron_tpt.files import atomic_write, write_json
from megatron_tpt.json_data import read_json
from megatron_tpt.logs import print_result
from megatron_tpt.markdown import table
from megatron_tpt.studies.results import Point, Summary, read_points, summarize


@dataclass(frozen=True)
class ReportOptions:
    """Which runs to report on."""

    results: list[Path]
    """The file report/results.json of every run."""
    output: Path
    """The folder for the report."""


@dataclass(frozen=True)
class Results:
    """What the runs have left."""

    points: list[Point]
    runs: list[dict[str, Any]]
    by_doors: list[dict[str, dict[str, float]]]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> "Results":
        """Raises UserError for a file that is none."""
        points = [point for path in paths for point in read_points(path)]
        contents = [read_json(path) for path in paths]
        runs = [one for content in contents for one in content["runs"]]
        return cls(points, runs, [content["by_doors"] for content in contents])

    @property
    def arms(self) -> list[Arm]:
        """The arms that were run, in the order of their definition."""
        names = {one["arm"] for one in self.runs}
        return [arm for arm in ALL_ARMS if arm.name in names]

    @property
    def num_seeds(self) -> int:
        """Runs with different seeds."""
        return len({point.seed for point in self.points})


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def depth_table(results: Results, summaries: dict[str, Summary]) -> str:
    """A row per arm: its cost, and its accuracy at every depth with its interval."""
    rows = []
    for arm in results.arms:
        runs = [one for one in results.runs if one["arm"] == arm.name]
        cells = {depth: summaries[arm.label(depth)] for depth in arm.depths}
        shown = {depth: f"{_percent(s.mean)} [{_percent(s.low)}, {_percent(s.high)}]" for depth, s in cells.items()}
        costs = [f"{fmean(one['tokens'] for one in runs) / 1e6:.2f}M", f"{fmean(one['flops'] for one in runs):.2e}"]
        rows.append([arm.name, *costs, *(shown.get(depth, "") for depth in DEPTHS)])
    return table(["arm", "tokens", "FLOPs", *(f"r = {depth}" for depth in DEPTHS)], rows)


def doors_table(results: Results) -> str:
    """Mean accuracy by the number of doors, of the recurrent arm at every depth and of the static one."""
    labels = [
        *(RECURRENT.label(depth) for depth in DEPTHS),
        *(arm.name for arm in results.arms if not arm.is_recurrent),
    ]
    rows = []
    for label in labels:
        means = [fmean(one[label][str(doors)] for one in results.by_doors) for doors in LENGTHS]
        rows.append([label, *map(_percent, means)])
    return table(["accuracy in %", *(f"{doors} doors" for doors in LENGTHS)], rows)


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """One line per claim, those that hold first."""
    order = ["holds", "not decided", "does not hold"]
    return [
        f"- {one.verdict}: {one.claim} ({100 * one.difference:+.1f} points [{100 * one.low:+.1f}, "
        f"{100 * one.high:+.1f}])"
        for one in sorted(verdicts, key=lambda one: order.index(one.verdict))
    ]


def as_markdown(results: Results, verdicts: Sequence[Verdict]) -> str:
    """The page."""
    summaries = {summary.arm: summary for summary in summarize(results.points)}
    seeds = ", ".join(map(str, sorted({point.seed for point in results.points})))
    several = results.num_seeds > 1
    interval = "of the mean over the seeds (Student's t)" if several else "over the problems (Wilson), one seed"
    paired = "paired over the seeds" if several else "Newcombe's for two shares"
    problems = results.points[0].num_problems
    return "\n\n".join(
        [
            "# Recurrence in miniature",
            f"Accuracy in % on {problems} held-out walks of {LENGTHS[0]} to {LENGTHS[-1]} doors; guessing gives "
            f"{_percent(1 / len(ROOMS))}. Seeds: {seeds}. In brackets: 95 % interval {interval}. Static models have no "
            f"depth: their accuracy is in the first column.",
            depth_table(results, summaries),
            doors_table(results),
            f"## Claims\n\nWith the difference in accuracy and its 95 % interval ({paired}). Far better: by more than "
            f"{_percent(FAR)} points; as good: within {_percent(CLOSE)}. A claim holds when its whole interval is in "
            f"that range, and does not when the interval is outside.",
            "\n".join(verdict_lines(verdicts)),
            "![accuracy by depth](depth.png)",
        ]
    ) + "\n"  # fmt: skip


def write_depth_report(folder: Path, paths: Sequence[Path]) -> None:
    """Write report.md, report.json and depth.png, and print the page."""
    results = Results.read(paths)
    verdicts = judge_all(results.points)
    page = as_markdown(results, verdicts)
    content = {
        "summaries": list(map(asdict, summarize(results.points))),
        "verdicts": list(map(asdict, verdicts)),
        "runs": results.runs,
    }
    write_json(folder / "report.json", content)
    with atomic_write(folder / "report.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    with atomic_write(folder / "depth.png") as temporary:
        _plot(temporary, results)
    print_result(page, end="")


def _plot(path: Path, results: Results) -> None:
    """Accuracy against depth: a curve per recurrent arm, a horizontal line per static one."""
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a display
    from matplotlib import pyplot

    summaries = {summary.arm: summary for summary in summarize(results.points)}
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, arm in enumerate(results.arms):
        line, color = [summaries[arm.label(depth)] for depth in arm.depths], f"C{number}"
        mean, low, high = ([getattr(one, name) for one in line] for name in ("mean", "low", "high"))
        if arm.is_recurrent:
            errors = [[m - b for m, b in zip(mean, low, strict=True)], [t - m for m, t in zip(mean, high, strict=True)]]
            axes.errorbar(arm.depths, mean, errors, marker="o", capsize=3, color=color, label=arm.name)
        else:
            axes.axhline(mean[0], color=color, linestyle="--", label=arm.name)
            axes.axhspan(low[0], high[0], color=color, alpha=0.1)
    axes.axhline(1 / len(ROOMS), color="grey", linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(DEPTHS, list(map(str, DEPTHS)))
    axes.set(xlabel="iterations r", ylabel="accuracy, held-out walks", ylim=(-0.02, 1.02))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def main() -> None:
    options = parse(ReportOptions, description=__doc__)
    write_depth_report(options.output, options.results)


if __name__ == "__main__":
    run(main)
