"""What the miniature is to show, and whether it does: decided by the figures alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arms import ADAMW, NO_CURRICULUM, RECURRENT, STATIC, STATIC_FLOPS, UNTRAINED

from megatron_tpt.studies.claims import Decision, decide
from megatron_tpt.studies.results import Point, difference

FAR = 0.1
"""A difference that is called large, in shares of the problems."""
CLOSE = 0.05
"""A difference that is called none."""
DEEPEST = RECURRENT.label(8)


@dataclass(frozen=True)
class Claim:
    """That the accuracy of one arm exceeds that of another by an amount between two limits."""

    text: str
    first: str
    second: str
    low: float = 0.0
    high: float = math.inf


CLAIMS = (
    Claim("r = 2 is far better than r = 1", RECURRENT.label(1), RECURRENT.label(2), low=FAR),
    Claim("r = 4 is better than r = 2", RECURRENT.label(2), RECURRENT.label(4)),
    Claim("r = 8 is as good as r = 4", RECURRENT.label(4), RECURRENT.label(8), low=-CLOSE, high=CLOSE),
    Claim("r = 8 is better than the static model at equal tokens", STATIC.name, DEEPEST),
    Claim("r = 8 is better than the static model at equal FLOPs", STATIC_FLOPS.name, DEEPEST),
    Claim("the depth curriculum is better than none at equal FLOPs", NO_CURRICULUM.label(8), DEEPEST),
    Claim("a trained parent is better than a random one", UNTRAINED.label(8), DEEPEST),
    Claim("Muon is better than AdamW", ADAMW.label(8), DEEPEST),
)


@dataclass(frozen=True)
class Verdict:
    """A claim with the difference that was measured."""

    claim: str
    difference: float
    """Mean over the seeds of second - first, in shares of the problems."""
    low: float
    high: float
    verdict: Decision


def judge(claim: Claim, first: Sequence[Point], second: Sequence[Point]) -> Verdict:
    """A claim, given the points of both arms."""
    mean, low, high = difference(first, second)
    return Verdict(claim.text, mean, low, high, decide(low, high, claim.low, claim.high))


def judge_all(points: Sequence[Point]) -> list[Verdict]:
    """All claims whose arms were run."""
    by_arm: Mapping[str, list[Point]] = {
        arm: [point for point in points if point.arm == arm] for arm in {point.arm for point in points}
    }
    return [
        judge(claim, by_arm[claim.first], by_arm[claim.second])
        for claim in CLAIMS
        if claim.first in by_arm and claim.second in by_arm
    ]
