"""Figures from graded samples. Samples of one problem are not independent: every error is taken over problems.

pass@1        mean over problems of the share of right samples; its standard error is that of the mean over problems
              (the clustered one, with problems as clusters)
interval      95%, Wilson's, with as many trials as would have that standard error: it stays within 0 and 1, and has a
              width at 0 and at 1
pass@k        the chance that one of k samples is right, without bias: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374)
majority@k    the chance that the answer that most of k samples give is right; ties share
difference    of two models on the same problems: the mean of the problems' differences, with Student's interval
"""

import collections
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from megatron_tpt.evaluation.samples import Sample

CONFIDENCE = 0.95
_MAX_SUBSETS = 400
"""Of the samples of a problem, for majority@k where k is less than their number: all, or as many at random."""


@dataclass(frozen=True)
class Difference:
    """How much better one model is than another on the same problems."""

    difference: float
    stderr: float | None
    """None for a single problem."""
    interval: tuple[float, float] | None
    p_value: float | None
    """Of a paired t test."""
    num_problems: int


def rates(samples: Sequence[Sample]) -> dict[str, float]:
    """The share of right samples of every problem."""
    return {name: float(np.mean([sample.correct for sample in own])) for name, own in by_problem(samples).items()}


def by_problem(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The samples of every problem, in their order."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.id, []).append(sample)
    return found


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of `values`; None for a single one."""
    return float(stats.sem(values)) if len(values) > 1 else None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean of shares, see above."""
    mean, error = float(np.mean(values)), standard_error(values)
    trials = mean * (1 - mean) / error**2 if error else float(len(values))
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)
    center = (mean + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(mean * (1 - mean) / trials + z**2 / (4 * trials**2))
    return max(0.0, float(center - half)), min(1.0, float(center + half))


def sizes(num_samples: int) -> list[int]:
    """The k of pass@k and majority@k: powers of two, and all samples."""
    return sorted({2**i for i in range(1, num_samples.bit_length()) if 2**i <= num_samples} | ({num_samples} - {1}))


def pass_at_k(samples: Sequence[Sample], k: int) -> float:
    """The mean over problems of the unbiased pass@k."""
    counts = ((len(own), sum(sample.correct for sample in own)) for own in by_problem(samples).values())
    return float(np.mean([_pass_at_k(n, c, k) for n, c in counts]))


def _pass_at_k(n: int, c: int, k: int) -> float:
    return 1.0 if n - c < k else 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def majority_at_k(problems: Sequence[Sequence[tuple[int | None, bool]]], k: int) -> float:
    """The mean over problems of majority@k. A problem is, for every sample, the group of its answer (None without an
    answer, which is no vote) and whether it is right."""
    return float(np.mean([_majority(votes, k, np.random.default_rng([i, k])) for i, votes in enumerate(problems)]))


def _majority(votes: Sequence[tuple[int | None, bool]], k: int, generator: np.random.Generator) -> float:
    if k == len(votes):
        return _vote(votes)
    subsets: Iterable[Sequence[int]]
    if math.comb(len(votes), k) <= _MAX_SUBSETS:
        subsets = itertools.combinations(range(len(votes)), k)
    else:
        subsets = (generator.choice(len(votes), k, replace=False).tolist() for _ in range(_MAX_SUBSETS))
    return float(np.mean([_vote([votes[i] for i in subset]) for subset in subsets]))


def _vote(votes: Sequence[tuple[int | None, bool]]) -> float:
    counts = collections.Counter(group for group, _ in votes if group is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [group for group, count in counts.items() if count == most]
    right = {group for group, correct in votes if correct}
    return sum(group in right for group in winners) / len(winners)


def spread(samples: Sequence[Sample]) -> float | None:
    """The standard deviation of the accuracies of sample 0 of every problem, sample 1 and so on; None for one."""
    by_number: dict[int, list[bool]] = {}
    for sample in samples:
        by_number.setdefault(sample.sample, []).append(sample.correct)
    means = [np.mean(correct) for correct in by_number.values()]
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


def mean_and_p95(values: Sequence[int]) -> tuple[float, float]:
    """The mean and the 95th percentile."""
    return float(np.mean(values)), float(np.percentile(values, 95))


def difference(first: Mapping[str, float], second: Mapping[str, float]) -> Difference | None:
    """Of the shares of right samples (see `rates`), `second` minus `first`, over the problems that both have."""
    common = sorted(first.keys() & second.keys())
    if not common:
        return None
    values = np.array([second[name] - first[name] for name in common])
    mean = float(values.mean())
    if len(values) == 1:
        return Difference(mean, None, None, None, 1)
    if not values.std():  # every problem differs by the same: no spread to test against
        return Difference(mean, 0.0, (mean, mean), None if mean else 1.0, len(values))
    test: Any = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    return Difference(mean, float(stats.sem(values)), (float(low), float(high)), float(test.pvalue), len(values))
