"""What a study's figures say: means, paired differences and interactions, each with its 95 % interval.

The replicates (seeds) are the sample: everything is computed for each of them, then Student's t gives the interval and
the p-value of the mean (scipy.stats.ttest_1samp). Differences are paired: both arms with the same seed. p-values of one
table are adjusted together (Benjamini and Hochberg 1995). With a single replicate there is no such interval; where the
number of problems is known, that over the problems is given in its place (Wilson, Newcombe), without a p-value.
"""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy import stats

from megatron_tpt.errors import UserError
from megatron_tpt.studies.results import newcombe_interval, wilson_interval
from megatron_tpt.studies.study import ReportConfig, chosen_levels
from megatron_tpt.studies.table import Row

_ROUNDING = 1e-12
"""Of figures, relative to the largest."""
Cell = tuple[tuple[str, str], ...]
"""The levels of some factors."""


@dataclass(frozen=True)
class Estimate:
    """A mean over the replicates."""

    what: dict[str, str]
    """Factor: level, or what is compared: "b - a", or what is averaged over: "(mean)"."""
    mean: float
    low: float | None
    """Lower end of the 95 % interval; None where there is none."""
    high: float | None
    num_replicates: int
    rows: tuple[int, ...]
    """The rows of the table that it is from, counted from 1."""
    p: float | None = None
    """Of no difference, adjusted over the table."""


class Comparison:
    """The figures of one metric."""

    def __init__(self, rows: Sequence[Row], metric: str, config: ReportConfig) -> None:
        """`rows` are those of all metrics. Raises UserError where two of them have the same levels."""
        self.config, self.metric = config, metric
        self.rows = {number: row for number, row in enumerate(rows, start=1) if row.metric == metric}
        names = next((list(row.levels) for row in self.rows.values()), [])
        self.factors = [name for name in names if name != config.replicate]
        """All but the replicates."""
        self.cells: dict[Cell, dict[str, int]] = {}
        """Levels: replicate: the number of the row."""
        for number, row in self.rows.items():
            own = self.cells.setdefault(tuple((name, row.levels[name]) for name in self.factors), {})
            replicate = row.levels.get(config.replicate, "")
            if replicate in own:
                levels = ", ".join(level for level in row.levels.values() if level)
                raise UserError(f"{row.source}: two rows of {metric} have the levels {levels}: name the fields that "
                                f"distinguish them in results.factors")  # fmt: skip
            own[replicate] = number
        self.compared = [name for name in self.factors if name != config.x and len(self._levels(name)) > 1]
        """The factors whose levels are compared."""

    def _levels(self, factor: str) -> list[str]:
        """The levels that there are, the baseline first."""
        found = list(dict.fromkeys(row.levels[factor] for row in self.rows.values() if row.levels[factor] != ""))
        first = self.config.baseline.get(factor)
        return sorted(found, key=lambda level: level != first)

    def means(self) -> list[Estimate]:
        """Of every combination of levels."""
        found = []
        for cell, replicates in self.cells.items():
            values = [self.rows[number].value for number in replicates.values()]
            low, high, _ = _t_interval(values, _ROUNDING * max(map(abs, values)))
            numbers = tuple(sorted(replicates.values()))
            if trials := self.rows[numbers[0]].trials:
                if low is None or high is None:
                    low, high = wilson_interval(values[0], trials)
                low, high = max(low, 0.0), min(high, 1.0)
            found.append(Estimate(dict(cell), statistics.fmean(values), low, high, len(values), numbers))
        return found

    def differences(self) -> list[Estimate]:
        """Every level of every factor against the baseline: with each combination of the others, then in their mean."""
        found = []
        for factor in self.compared:
            first, *others = self._levels(factor)
            for level in others:
                weights: list[tuple[dict[str, str], float]] = [({factor: level}, 1.0), ({factor: first}, -1.0)]
                found += self._contrasts(weights, {factor: f"{level} - {first}"})
        return _adjusted(found)

    def difference(self, of: Mapping[str, Any], minus: Mapping[str, Any]) -> Estimate | None:
        """The mean of the results with the levels `of` minus that of those `minus`. Of factors that neither names, both
        take the same levels: those of which they have all results. None where a named combination has none."""
        named = [name for name in self.factors if name in of or name in minus]
        sides = [self._matching(side, named) for side in (of, minus)]
        if not all(sides):
            return None
        groups = [others for side in sides for others in side.values()]
        common = [cell for cell in groups[0] if all(cell in group for group in groups)]
        if not common:
            return None
        parts = []
        for side, sign in zip(sides, (1, -1), strict=True):
            cells = [{**dict(levels), **dict(others)} for levels in side for others in common]
            parts += [(self._cell({}, cell), sign / len(cells)) for cell in cells]
        return self._sum(parts, {})

    def _matching(self, side: Mapping[str, Any], named: Sequence[str]) -> dict[Cell, dict[Cell, None]]:
        """Of the combinations of levels of the factors `named` that a side has, those of the other factors in order;
        empty where the side names a combination of which there are no results."""
        wanted = {name: chosen_levels(levels) for name, levels in side.items()}
        found: dict[Cell, dict[Cell, None]] = {}
        for cell in self.cells:
            if all(dict(cell).get(name) in levels for name, levels in wanted.items()):
                own = tuple(pair for pair in cell if pair[0] in named)
                found.setdefault(own, {})[tuple(pair for pair in cell if pair[0] not in named)] = None
        there = {tuple(dict(own)[name] for name in wanted) for own in found}
        return found if there == set(itertools.product(*wanted.values())) else {}

    def interactions(self) -> list[Estimate]:
        """How much the difference between two levels depends on another factor: a difference of differences."""
        found = []
        for one, two in itertools.combinations(self.compared, 2):
            (first, *others), (first_2, *others_2) = self._levels(one), self._levels(two)
            for level, level_2 in itertools.product(others, others_2):
                weights = [
                    ({one: level, two: level_2}, 1.0), ({one: first, two: level_2}, -1.0),
                    ({one: level, two: first_2}, -1.0), ({one: first, two: first_2}, 1.0),
                ]  # fmt: skip
                found += self._contrasts(weights, {one: f"{level} - {first}", two: f"{level_2} - {first_2}"})
        return _adjusted(found)

    def _contrasts(self, weights: Sequence[tuple[Mapping[str, str], float]], what: dict[str, str]) -> list[Estimate]:
        """A weighted sum over levels: with each combination of the other factors that has all of them, and in the mean
        over these combinations: of the same level of x, and of results of the same factors."""
        whole = [cell for cell in self._others(what) if all(self._cell(cell, levels) for levels, _ in weights)]
        groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
        found = []
        for cell in whole:
            found.append(self._contrast([cell], weights, {**cell, **what}))
            kept = {name: level if name == self.config.x or not level else "(mean)" for name, level in cell.items()}
            groups.setdefault(tuple(kept.values()), []).append(cell)
        for levels, cells in groups.items():
            if len(cells) > 1:
                found.append(self._contrast(cells, weights, {**dict(zip(cells[0], levels, strict=True)), **what}))
        return [one for one in found if one is not None]

    def _others(self, what: Mapping[str, str]) -> list[dict[str, str]]:
        """The combinations of levels of all factors but those in `what`."""
        cells = [{name: level for name, level in cell if name not in what} for cell in self.cells]
        return [dict(cell) for cell in dict.fromkeys(tuple(cell.items()) for cell in cells)]

    def _cell(self, others: Mapping[str, str], levels: Mapping[str, str]) -> dict[str, int]:
        merged = {**others, **levels}
        return self.cells.get(tuple((name, merged[name]) for name in self.factors), {})

    def _contrast(
        self,
        cells: Sequence[Mapping[str, str]],
        weights: Sequence[tuple[Mapping[str, str], float]],
        what: Mapping[str, str],
    ) -> Estimate | None:
        """The mean over cells of a weighted sum, of the replicates that have all that it needs."""
        parts = [(self._cell(cell, levels), weight / len(cells)) for cell in cells for levels, weight in weights]
        return self._sum(parts, {name: what[name] for name in self.factors})

    def _sum(self, parts: Sequence[tuple[Mapping[str, int], float]], what: dict[str, str]) -> Estimate | None:
        """A weighted sum of cells, of the replicates that all of them have; None where there is none."""
        common = [name for name in parts[0][0] if all(name in replicates for replicates, _ in parts)]
        if not common:
            return None
        numbers = tuple(sorted({each[name] for each, _ in parts for name in common}))
        rounding = _ROUNDING * max(abs(self.rows[number].value) for number in numbers)
        values = [sum(weight * self.rows[each[name]].value for each, weight in parts) for name in common]
        values = [0.0 if abs(value) <= rounding else value for value in values]
        low, high, p = _t_interval(values, rounding)
        if len(common) == 1 and len(parts) == 2:
            low, high = self._newcombe(parts[1][0][common[0]], parts[0][0][common[0]])
        return Estimate(what, statistics.fmean(values), low, high, len(values), numbers, p)

    def _newcombe(self, first: int, second: int) -> tuple[float | None, float | None]:
        """Of two shares, a row each."""
        one, two = self.rows[first], self.rows[second]
        if not (one.trials and two.trials):
            return None, None
        return newcombe_interval((one.value, one.trials), (two.value, two.trials))


def _t_interval(values: Sequence[float], rounding: float) -> tuple[float | None, float | None, float | None]:
    """Student's 95 % interval of the mean, and the p-value of a mean of 0; None of one value.

    Values that differ by `rounding` at most are equal and have no p-value: 0.9 - 0.6 beside 0.5 - 0.2 is no spread.
    """
    if len(values) < 2:
        return None, None, None
    mean = statistics.fmean(values)
    if max(values) - min(values) <= rounding:
        return mean, mean, None
    test = stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(0.95)
    return float(interval.low), float(interval.high), float(test.pvalue)


def _adjusted(estimates: Iterable[Estimate]) -> list[Estimate]:
    """With p-values adjusted for how many there are (Benjamini and Hochberg)."""
    found = list(estimates)
    places = [place for place, one in enumerate(found) if one.p is not None]
    if places:
        adjusted = stats.false_discovery_control([found[place].p for place in places])
        for place, p in zip(places, adjusted, strict=True):
            found[place] = replace(found[place], p=float(p))
    return found
