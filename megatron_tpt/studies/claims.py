"""Whether a claim about a difference holds: its 95 % interval decides, and nothing else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_tpt.studies.comparison import Comparison, Estimate
from megatron_tpt.studies.study import Claim

Decision = Literal["holds", "does not hold", "not decided"]


@dataclass(frozen=True)
class Judged:
    """A claim with the difference that was measured."""

    claim: Claim
    difference: Estimate | None
    """None where results are missing."""
    verdict: Decision


def decide(low: float | None, high: float | None, above: float = 0.0, below: float = math.inf) -> Decision:
    """holds: the whole interval is between both limits; does not hold: it is outside; not decided: it is in part, or
    there is none."""
    if low is None or high is None:
        return "not decided"
    if above < low and high <= below:
        return "holds"
    return "does not hold" if high <= above or low > below else "not decided"


def judge(comparison: Comparison, claims: Sequence[Claim]) -> list[Judged]:
    """Every claim about the metric of the comparison, in the order of the study."""
    found = []
    for claim in claims:
        if claim.metric in (None, comparison.metric):
            difference = comparison.difference(claim.of, claim.minus)
            low, high = (difference.low, difference.high) if difference else (None, None)
            found.append(Judged(claim, difference, decide(low, high, claim.above, claim.below)))
    return found
