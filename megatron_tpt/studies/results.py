"""Results of runs, and their mean and interval over seeds.

A run leaves a JSON file with a list `points`; each point has the fields of `Point`.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from megatron_tpt.errors import UserError
from megatron_tpt.json_data import read_json


@dataclass(frozen=True)
class Point:
    """One measurement: an arm after a number of training tokens, with one seed."""

    arm: str
    tokens: int
    accuracy: float
    num_problems: int
    seed: int


@dataclass(frozen=True)
class Summary:
    """An arm after a number of training tokens, over all seeds."""

    arm: str
    tokens: int
    mean: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    num_seeds: int


def read_points(path: Path) -> list[Point]:
    """The points of a results file. Raises UserError when it holds none."""
    try:
        rows = read_json(path)["points"]
        return [Point(**row) for row in rows]
    except OSError as error:
        raise UserError(f"{path}: no results there ({error.strerror}); did the run succeed?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a results file with `points` ({error})") from error


def summarize(points: Iterable[Point]) -> list[Summary]:
    """Mean and 95 % interval of every arm at every number of tokens, in the order of the arms' first points.

    Several seeds: Student's t interval of the seeds' mean. One seed: Wilson's interval over the problems, which says
    nothing about what another seed would bring.
    """
    groups: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point.arm, point.tokens), []).append(point)
    summaries = []
    for (arm, tokens), group in groups.items():
        mean = statistics.fmean(point.accuracy for point in group)
        if len(group) > 1:
            low, high = t_interval([point.accuracy for point in group])
        else:
            low, high = wilson_interval(mean, group[0].num_problems)
        summaries.append(Summary(arm, tokens, mean, low, high, len({point.seed for point in group})))
    arms = list(dict.fromkeys(summary.arm for summary in summaries))
    return sorted(summaries, key=lambda summary: (arms.index(summary.arm), summary.tokens))


def difference(first: Sequence[Point], second: Sequence[Point]) -> tuple[float, float, float]:
    """Mean of second - first over the seeds that both have, with its 95 % interval: of two arms, a point per seed.

    Several seeds: Student's t interval of the paired differences. One seed: that of two shares, as if the problems were
    not the same. Raises ValueError when no seed is in both.
    """
    of_first = {point.seed: point for point in first}
    pairs = [(of_first[point.seed], point) for point in second if point.seed in of_first]
    if not pairs:
        raise ValueError("two arms have no seed in common")
    values = [other.accuracy - one.accuracy for one, other in pairs]
    mean = statistics.fmean(values)
    if len(values) > 1:
        half = _half_width(values)
        return mean, mean - half, mean + half
    one, other = pairs[0]
    return mean, *newcombe_interval((one.accuracy, one.num_problems), (other.accuracy, other.num_problems))


def newcombe_interval(first: tuple[float, int], second: tuple[float, int]) -> tuple[float, float]:
    """The 95 % interval of the difference second - first of two shares, each with its number of trials (R. G. Newcombe
    1998, method 10)."""
    (share_1, _), (share_2, _) = first, second
    (low_1, high_1), (low_2, high_2) = wilson_interval(*first), wilson_interval(*second)
    low = share_2 - share_1 - math.hypot(share_2 - low_2, high_1 - share_1)
    return low, share_2 - share_1 + math.hypot(high_2 - share_2, share_1 - low_1)


def _half_width(values: Sequence[float]) -> float:
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of two or more values between 0 and 1, clipped to that range."""
    mean = statistics.fmean(values)
    half = _half_width(values)
    return max(0.0, mean - half), min(1.0, mean + half)


def wilson_interval(share: float, num_trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `num_trials` (E. B. Wilson 1927)."""
    interval = stats.binomtest(round(share * num_trials), num_trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
