"""Compare one candidate with the reference in tiers: as text, as exact numbers, as mathematics (math-verify).

The first tier that can decide does: two rational numbers that differ are not passed to the next. Lists, tuples,
intervals and matrices are compared element by element, so that exactly the same values must be there.
"""

import re
from typing import Any, Literal

from megatron_tpt.grading.latex import (
    Parts,
    balanced,
    key,
    letters,
    normalize,
    parts,
    split_unit,
    texts,
    without_prefix,
)
from megatron_tpt.grading.numeric import rational

Tier = Literal["text", "number", "value", "math-verify", "instructions", "tests"]
"""What decided that an answer is right."""

_ORDER: tuple[Tier, ...] = ("text", "number", "math-verify")
_MAX_LENGTH = 2000
"""Longer candidates, in characters, are only compared as text."""
_DIGITS = 50
_RELATION = re.compile(r"[<>|=]|\\(?:le|ge|ne|lt|gt|in|mid|mathbb|setminus)(?![a-z])")
_DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)(?![0-9.])")


def same_mathematics(reference: str, answer: str) -> Tier | None:
    """The tier that shows the two to be equal; None for different answers.

    Hostile answers can take unlimited time or much memory: call it in a process that can be killed.
    """
    if len(answer) > _MAX_LENGTH:
        return "text" if key(reference) == key(answer) else None
    return _same(normalize(reference), normalize(answer))


def _same(gold: str, answer: str) -> Tier | None:
    if key(gold) == key(answer):
        return "text"
    if not (gold and answer):
        return None
    alike = _alike(gold, answer)
    if alike is None:
        return None
    gold, answer = alike
    if key(gold) == key(answer):
        return "text"
    numbers = rational(gold), rational(answer)
    if None not in numbers:
        return "number" if numbers[0] == numbers[1] else None
    gold_parts, answer_parts = parts(gold), parts(answer)
    if gold_parts and answer_parts and gold_parts.kind == answer_parts.kind:
        return _same_parts(gold_parts, answer_parts)
    if (gold_parts or answer_parts) and not (_RELATION.search(gold) or _RELATION.search(answer)):
        return None
    if any(side and side.kind == "list" for side in (gold_parts, answer_parts)):
        return None
    if texts(gold) != texts(answer):  # math-verify reads "3 \\text{ or more}" as 3
        return None
    symbols = letters(gold), letters(answer)
    if symbols[0] != symbols[1] and {x.lower() for x in symbols[0]} == {x.lower() for x in symbols[1]}:
        return None  # to math-verify, a and A are the same
    return "math-verify" if _verified(gold, answer) else None


def _alike(gold: str, answer: str) -> tuple[str, str] | None:
    """Both without what one of them may lack: a unit, or "x =" in front. None for different units."""
    (gold, gold_unit), (answer, answer_unit) = split_unit(gold), split_unit(answer)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return None
    related = [bool(re.search(r"=|\\in(?![a-z])", side)) for side in (gold, answer)]
    return (without_prefix(gold), without_prefix(answer)) if related[0] != related[1] else (gold, answer)


def _same_parts(gold: Parts, answer: Parts) -> Tier | None:
    if len(gold.items) != len(answer.items):
        return None
    remaining = [normalize(item) for item in answer.items]
    ordered = gold.kind not in ("list", "union")
    tiers: list[Tier] = []
    for item in map(normalize, gold.items):
        for i in range(1 if ordered else len(remaining)):
            tier = _same(item, remaining[i])
            if tier is not None:
                tiers.append(tier)
                del remaining[i]
                break
        else:
            return None
    return max(tiers, key=_ORDER.index)


def _verified(gold: str, answer: str) -> bool:
    """Whether math-verify takes the two for equal. It gets no limit of time: the caller's process has one."""
    if not (balanced(gold) and balanced(answer)):
        return False
    parsed = _parse(gold), _parse(answer)
    if None in parsed or not _equal_at_samples(*parsed):
        return False
    from math_verify import verify

    # A relation and the set of its solutions are the same answer, whichever of them is the reference.
    return bool(verify(*parsed, numeric_precision=_DIGITS, allow_set_relation_comp=True, timeout_seconds=None))


def _parse(text: str) -> Any | None:
    """The expression that math-verify reads, with decimals as exact fractions; None where it reads none."""
    from math_verify import LatexExtractionConfig, parse

    exact = _DECIMAL.sub(lambda match: f"\\frac{{{int(match[1] + match[2])}}}{{1{'0' * len(match[2])}}}", text)
    found = parse(
        f"\\boxed{{{exact}}}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return found[0] if found else None


def _equal_at_samples(gold: Any, answer: Any) -> bool:
    """Whether two expressions agree to many significant digits, where they can be evaluated at all.

    math-verify rounds absolutely: to it, 1/2004! is 1/2006!, and x is x + 10^{-20}. Equations, of which it may compare
    only the right sides (y = 2x and -y = 2x), are the same when their differences of sides are proportional.
    """
    from sympy import Eq, Expr, Rational

    equations = all(
        isinstance(side, Eq) and isinstance(side.lhs, Expr) and isinstance(side.rhs, Expr) for side in (gold, answer)
    )  # x in [1, 2] is read as one, too, with an interval on its right
    if equations:
        gold, answer = gold.lhs - gold.rhs, answer.lhs - answer.rhs
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        return True
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    points = [{symbol: Rational(start + 2 * i, 7) for i, symbol in enumerate(symbols)} for start in (3, 11)]
    try:
        values = [[side.doit().subs(point).evalf(_DIGITS) for side in (gold, answer)] for point in points]
        if not all(value.is_number for pair in values for value in pair):
            return True
        if equations:
            (gold_1, answer_1), (gold_2, answer_2) = values
            return _close(gold_1 * answer_2, gold_2 * answer_1)
        return all(_close(*pair) for pair in values)
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return True


def _close(a: Any, b: Any) -> bool:
    scale = max(abs(a), abs(b))
    return not scale.is_finite or bool(abs(a - b) <= scale / 10 ** (_DIGITS - 15))
