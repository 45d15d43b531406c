"""How long the thinking is, by what is known of the documents: subject, level, audience (TPT, section 4).

    OUTPUT/report.md       the tables of all columns
    OUTPUT/COLUMN.csv      one table for other programs
    OUTPUT/COLUMN.png      its means with their intervals

Records are read one by one; memory grows only with the number of groups.
"""

import csv
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write
from megatron_tpt.jobs.settings import require_apart
from megatron_tpt.logs import print_result
from megatron_tpt.markdown import inline, table
from megatron_tpt.names import counted
from megatron_tpt.records import ReadCounts, expand_sources, read_records
from megatron_tpt.rich_text import plotted
from megatron_tpt.thinking.analysis_options import AnalysisOptions
from megatron_tpt.thinking.statistics import ThinkingStatistics

logger = logging.getLogger(__name__)

NONE, OTHER = "(none)", "(other)"

_MAX_GROUPS = 10_000
_MAX_BARS = 40
_LENGTHS = ("thinking_tokens", "document_tokens")
_HEADER = (
    ("documents", "{:,}"),
    ("mean thinking tokens", "{:,.0f}"),
    ("95% low", "{:,.0f}"),
    ("95% high", "{:,.0f}"),
    ("median", "{:,.0f}"),
    ("90th percentile", "{:,.0f}"),
    ("per document token", "{:.2f}"),
    ("cut at the limit", "{:.1%}"),
    ("to overall mean", "{:.2f}"),
)


@dataclass(frozen=True)
class Group:
    """The documents with one value in a column."""

    name: str
    statistics: ThinkingStatistics

    @property
    def mean(self) -> float:
        """Mean thinking tokens."""
        return self.statistics.thinking_tokens.mean

    def row(self, overall_mean: float) -> list[float]:
        """The figures below `_HEADER`."""
        lengths = self.statistics.thinking_tokens
        half = lengths.half_interval
        return [
            lengths.count,
            self.mean,
            self.mean - half,
            self.mean + half,
            lengths.percentile(50),
            lengths.percentile(90),
            _ratio(lengths.total, self.statistics.document_tokens.total),
            self.statistics.truncated / lengths.count,
            _ratio(self.mean, overall_mean),
        ]


@dataclass
class Analysis:
    """Statistics of all records, and by the values of every column."""

    columns: Sequence[str]
    overall: ThinkingStatistics = field(default_factory=ThinkingStatistics)
    groups: dict[str, dict[str, ThinkingStatistics]] = field(init=False)
    """By column, then by value."""
    without_length: int = 0
    """Records that do not say how long their thinking is, or have none."""
    meta_names: set[str] = field(default_factory=set)
    """Columns of `meta` that were seen in the first records."""

    def __post_init__(self) -> None:
        self.groups = {column: {} for column in self.columns}


def analyze(options: AnalysisOptions) -> Analysis:
    """Do what `tools/analyze_thinking.py` does. Raises UserError for records or columns that cannot be compared."""
    files = [source.path for source in expand_sources(options.input) if source.path]
    require_apart(options.output, options.input, files)
    analysis = collect(options)
    tables = [(column, merge_rare(analysis.groups[column], options.min_documents)) for column in options.columns]
    report = [f"# Thinking length\n\n{_preface(analysis)}"]
    for column, groups in tables:
        stem = re.sub(r"[^\w.-]", "_", column)
        report.append(f"## By {inline(column)}\n\n{markdown(groups, analysis.overall)}\n\n![]({stem}.png)")
        with atomic_write(options.output / f"{stem}.csv") as temporary:
            _write_csv(temporary, groups, analysis.overall)
        with atomic_write(options.output / f"{stem}.png") as temporary:
            _plot(temporary, column, groups, analysis.overall)
    text = "\n\n".join(report) + "\n"
    with atomic_write(options.output / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print_result(text)
    return analysis


def collect(options: AnalysisOptions) -> Analysis:
    """Read all records. Raises UserError when none has thinking, or a column is nowhere or has too many values."""
    analysis = Analysis(options.columns)
    counts = ReadCounts()
    for record in read_records(options.input, on_bad_record=options.on_bad_record, limit=options.limit, counts=counts):
        if counts.read <= 1000:
            analysis.meta_names |= _names(record.meta)
        if record.thinking is None or not all(isinstance(record.meta.get(name), int) for name in _LENGTHS):
            analysis.without_length += 1
            continue
        analysis.overall.add_record(record)
        for column, groups in analysis.groups.items():
            value = value_of(record.meta, column)
            if value not in groups and len(groups) == _MAX_GROUPS:
                raise UserError(f"--by {column}: has more than {_MAX_GROUPS:,} values; choose a column of few values")
            groups.setdefault(value, ThinkingStatistics()).add_record(record)
    for reason, number in counts.skipped.items():
        logger.warning(f"skipped {counted(number, 'bad record')}: {reason}")
    if not analysis.overall.records:
        raise UserError(
            "no record has thinking, meta.thinking_tokens and meta.document_tokens; give what tools/augment.py wrote"
        )
    for column, groups in analysis.groups.items():
        if groups.keys() == {NONE}:
            names = ", ".join(sorted(analysis.meta_names)) or "none"
            raise UserError(f"--by {column}: no record has this column in meta; there are: {names}")
    return analysis


def value_of(meta: Mapping[str, Any], column: str) -> str:
    """The value of a column as the name of a group: "(none)" where it is missing, null or empty. A column's whole name
    comes before what its dots lead to."""
    value: Any = meta
    for part in [column] if column in meta else column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None or value in ("", []):
        return NONE
    if isinstance(value, str):
        return " ".join(value.split()) or NONE
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _names(meta: Mapping[str, Any], prefix: str = "") -> set[str]:
    """The columns of `meta`, with dots into nested ones."""
    names: set[str] = set()
    for name, value in meta.items():
        names |= _names(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}"}
    return names


def merge_rare(groups: Mapping[str, ThinkingStatistics], min_documents: int) -> list[Group]:
    """The groups with the longest thinking first; those below `min_documents` are "(other)", which comes last but for
    the "(none)" of records without a value."""
    kept, other = [], ThinkingStatistics()
    for name, statistics in groups.items():
        if statistics.records >= min_documents and name != NONE:
            kept.append(Group(name, statistics))
        elif name != NONE:
            other.merge(statistics)
    kept.sort(key=lambda group: (-group.mean, group.name))
    last = [Group(OTHER, other)] if other.records else []
    return kept + last + ([Group(NONE, groups[NONE])] if NONE in groups else [])


def markdown(groups: Iterable[Group], overall: ThinkingStatistics) -> str:
    """The table of one column, with all records in its last row."""
    everything = Group("all", overall)
    rows = [
        [
            group.name,
            *(_cell(value, form) for value, (_, form) in zip(group.row(everything.mean), _HEADER, strict=True)),
        ]
        for group in (*groups, everything)
    ]
    return table(["group", *(name for name, _ in _HEADER)], rows)


def _cell(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)


def _preface(analysis: Analysis) -> str:
    without = analysis.without_length
    omitted = f" Without thinking, and omitted: {counted(without, 'record')}." if without else ""
    return (
        f"{analysis.overall.records:,} documents.{omitted} Lengths in tokens of the generator, percentiles within 1%; "
        "95% interval of the mean in the normal approximation."
    )


def _write_csv(path: Path, groups: Sequence[Group], overall: ThinkingStatistics) -> None:
    everything = Group("all", overall)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["group", *(name.replace(" ", "_").replace("%", "") for name, _ in _HEADER)])
        for group in (*groups, everything):
            figures = group.row(everything.mean)
            writer.writerow([group.name, *("" if math.isnan(figure) else f"{figure:.10g}" for figure in figures)])


def _plot(path: Path, column: str, groups: Sequence[Group], overall: ThinkingStatistics) -> None:
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a display
    from matplotlib import pyplot

    shown = groups[:_MAX_BARS]
    figure, axes = pyplot.subplots(figsize=(8, 1.8 + 0.32 * len(shown)), layout="constrained")
    names = [group.name if len(group.name) <= 40 else group.name[:39] + "…" for group in shown]
    halves = [group.statistics.thinking_tokens.half_interval for group in shown]
    errors = [0.0 if math.isnan(half) else half for half in halves]
    places = range(len(shown))
    colors = ["tab:grey" if group.name in (NONE, OTHER) else "tab:blue" for group in shown]
    axes.barh(places, [group.mean for group in shown], xerr=errors, color=colors, alpha=0.8, ecolor="black", capsize=3)
    axes.axvline(overall.thinking_tokens.mean, color="black", linestyle=":", label="mean of all documents")
    labels = [plotted(f"{name}  ({group.statistics.records:,})") for name, group in zip(names, shown, strict=True)]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    shown_part = f" (longest {_MAX_BARS} of {len(groups)})" if len(groups) > _MAX_BARS else ""
    axes.set(
        title=plotted(f"Thinking length by {column}{shown_part}"), xlabel="thinking tokens, mean and its 95% interval"
    )
    axes.margins(y=0.02)
    figure.legend(loc="outside lower right", frameon=False)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def _ratio(number: float, whole: float) -> float:
    return number / whole if whole else math.nan
