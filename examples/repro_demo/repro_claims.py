"""What policies are compared in, and which comparisons REPRO wins: decided by the figures alone.

With several seeds, intervals are Student's over the seeds, of paired differences where two arms are compared. With one
seed they are over the problems, and say nothing about what another seed would bring.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scipy import stats

from megatron_tpt.errors import UserError
from megatron_tpt.json_data import read_json

Metric = Literal["accuracy", "extra_tokens"]
METRICS: Mapping[Metric, tuple[str, int]] = {"accuracy": ("accuracy", 1), "extra_tokens": ("tokens beyond", -1)}
"""Name in the report, and whether more is better."""
PAIRS = (
    ("REPRO", "start"),
    ("REPRO", "GRPO"),
    ("REPRO", "GRPO with length penalty"),
    ("REPRO", "REPRO with shuffled rewards"),
    ("REPRO", "REPRO with constant rewards"),
    ("PPO with REPRO", "PPO"),
    ("REINFORCE++ with REPRO", "REINFORCE++"),
)
"""An arm with REPRO, and what it should beat."""


@dataclass(frozen=True)
class Policy:
    """The results of an arm with one seed."""

    arm: str
    seed: int
    problems: list[dict[str, Any]]
    """Fields of measure_policies.Answered."""
    curves: list[list[float]]
    """J of the problems with the most legs, after 0, 1, ... steps."""

    def of_problems(self, metric: str, num_legs: int | None = None) -> list[float]:
        """The values of all problems, or of those with so many legs."""
        return [one[metric] for one in self.problems if num_legs in (None, one["num_legs"])]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """An arm against another, in one metric."""

    arm: str
    other: str
    metric: Metric
    difference: Estimate
    """Of the arm minus the other."""
    num_seeds: int
    verdict: Literal["beats", "does not beat", "is beaten by"]
    """By whether the whole interval is on the one side of 0, or on the other."""


def read_policies(paths: Sequence[Path]) -> list[Policy]:
    """Those in files of measure_policies.py. Raises UserError for another file."""
    policies = []
    for path in paths:
        try:
            content = read_json(path)
            policies += [
                Policy(one["name"], content["seed"], one["problems"], one["curves"]) for one in content["policies"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no results of measure_policies.py ({error!r}); did it succeed?") from error
    return policies


def estimate(of_seeds: Sequence[Sequence[float]]) -> Estimate:
    """Of the values of problems with every seed."""
    values = list(map(statistics.fmean, of_seeds)) if len(of_seeds) > 1 else list(of_seeds[0])
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def compare(policies: Sequence[Policy], arm: str, other: str, metric: Metric) -> Comparison | None:
    """Two arms on the same problems; None where no seed has both."""
    first, second = ({one.seed: one for one in policies if one.arm == name} for name in (arm, other))
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    differences = []
    for seed in seeds:
        values = {one["id"]: one[metric] for one in second[seed].problems}
        differences.append([one[metric] - values[one["id"]] for one in first[seed].problems])
    found, sign = estimate(differences), METRICS[metric][1]
    low, high = sorted((sign * found.low, sign * found.high))
    verdict: Any = "beats" if low > 0 else "is beaten by" if high < 0 else "does not beat"
    return Comparison(arm, other, metric, found, len(seeds), verdict)


def compare_all(policies: Sequence[Policy]) -> list[Comparison]:
    """All pairs of which both arms were run, in every metric."""
    found = [compare(policies, arm, other, metric) for arm, other in PAIRS for metric in METRICS]
    return [one for one in found if one is not None]
