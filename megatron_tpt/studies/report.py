"""The table and the picture of a study: accuracy against training tokens, one row or line per arm."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_tpt.files import atomic_write
from megatron_tpt.markdown import inline, table
from megatron_tpt.rich_text import plain, plotted
from megatron_tpt.studies.results import Summary


def write_report(folder: Path, summaries: Sequence[Summary], title: str, chance: float | None = None) -> None:
    """Show the table on the terminal; write `table.md` and `accuracy.png` into `folder`."""
    Console().print(_table(summaries, title))
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(markdown(summaries, title), encoding="utf-8")
    with atomic_write(folder / "accuracy.png") as temporary:
        _plot(temporary, summaries, title, chance)


def rows(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """The header and a row per arm; a cell per number of tokens, in per cent: "83 [78, 87]"."""
    tokens = sorted({summary.tokens for summary in summaries})
    cells = {(s.arm, s.tokens): f"{s.mean:.0%} [{s.low:.0%}, {s.high:.0%}]".replace("%", "") for s in summaries}
    arms = list(dict.fromkeys(summary.arm for summary in summaries))
    header = ["accuracy in % after", *(f"{number / 1e6:.2f}M tokens" for number in tokens)]
    return header, [[arm, *(cells.get((arm, number), "") for number in tokens)] for arm in arms]


def markdown(summaries: Sequence[Summary], title: str) -> str:
    """The table as Markdown, with what the brackets mean."""
    return f"# {inline(title)}\n\n{table(*rows(summaries))}\n\n{_brackets(summaries)}\n"


def _brackets(summaries: Sequence[Summary]) -> str:
    num_seeds = max(summary.num_seeds for summary in summaries)
    if num_seeds == 1:
        return "In brackets: 95 % interval over the problems (Wilson), one seed."
    return f"In brackets: 95 % interval of the mean of {num_seeds} seeds (Student's t)."


def _table(summaries: Sequence[Summary], title: str) -> Table:
    header, body = rows(summaries)
    shown = Table(title=plain(title), caption=plain(_brackets(summaries)))
    for number, name in enumerate(header):
        shown.add_column(name, justify="right" if number else "left")
    for line in body:
        shown.add_row(*map(plain, line))
    return shown


def _plot(path: Path, summaries: Sequence[Summary], title: str, chance: float | None) -> None:
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for arm in dict.fromkeys(summary.arm for summary in summaries):
        line = [summary for summary in summaries if summary.arm == arm]
        mean = [summary.mean for summary in line]
        errors = [[s.mean - s.low for s in line], [s.high - s.mean for s in line]]
        axes.errorbar([s.tokens / 1e6 for s in line], mean, errors, marker="o", capsize=3, label=plotted(arm))
    if chance is not None:
        axes.axhline(chance, color="grey", linestyle=":", label="chance")
    axes.set(
        title=plotted(title),
        xlabel="training tokens (millions)",
        ylabel="accuracy, held-out problems",
        ylim=(-0.02, 1.02),
    )
    axes.legend()
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
