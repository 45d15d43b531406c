"""Answers: find the answer in what a model wrote, and compare it with the reference.

An answer that cannot be found is wrong. Nothing here looks at the reference while it reads the output.
"""

import functools
import importlib.util
import multiprocessing
import re
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.options import AnswerType
from megatron_tpt.processes import children_end_with_us

MATH_SECONDS = 20.0
"""Processor time for one answer; math-verify itself ends after 5 s what can be interrupted."""

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+(?![0-9A-Za-z]))?"
_NUMBER = re.compile(
    # No number starts inside a name (v7) or a number; a minus after something is a subtraction (9-5).
    r"(?<![A-Za-z0-9_])"
    r"(?P<sign>(?<![\w)\]}%.])[-\u2212](?=[$€£.0-9]))?[$€£]?(?P<inner_sign>(?<=[$€£])[-\u2212])?\s?"
    rf"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+/[0-9]))?(?P<value>{_DECIMAL})"
    r"(?:\s?/\s?(?P<divisor>[0-9]+(?:\.[0-9]+)?))?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")


class Checker(Protocol):
    """One way to read and compare answers."""

    def reference(self, text: str) -> Any | None:
        """The answer in a reference; None when there is none."""
        ...

    def extract(self, text: str) -> Any | None:
        """The answer in a model's text after its thinking; None when there is none."""
        ...

    def equal(self, reference: Any, answer: Any) -> bool:
        """Whether two answers are the same."""
        ...


def make_checker(answer_type: AnswerType) -> Checker:
    """The checker of that name."""
    checkers: dict[AnswerType, type[Checker]] = {
        "exact": ExactChecker,
        "number": NumberChecker,
        "math": MathChecker,
    }
    return checkers[answer_type]()


def after_thinking(output: str) -> str | None:
    """What stands after the last "</think>", or the whole output where there is no thinking.

    None for thinking that never ended: such an output has no answer.
    """
    _, _, rest = output.rpartition("</think>")
    return None if "<think>" in rest else rest


def find_answer(output: str, checker: Checker, pattern: str | None = None) -> Any | None:
    """The answer in a model's `output`; with `pattern`, in its last match (the first group, if it has one)."""
    text = after_thinking(output)
    if text is None:
        return None
    if pattern is not None:
        matches = list(re.finditer(pattern, text))
        if not matches:
            return None
        text = matches[-1][1 if matches[-1].re.groups else 0] or ""
    return checker.extract(text)


class ExactChecker:
    """The same text, apart from blanks around it."""

    def reference(self, text: str) -> str | None:
        return text.strip() or None

    extract = reference

    def equal(self, reference: str, answer: str) -> bool:
        return reference == answer


class NumberChecker:
    """The same number, exactly: 1,200 = $1200.00 = 1200, 0.5 = 1/2 = \\frac{1}{2}, 50% = 50."""

    def reference(self, text: str) -> Fraction | None:
        return find_number(text)

    extract = reference

    def equal(self, reference: Fraction, answer: Fraction) -> bool:
        return reference == answer


class MathChecker:
    """The same mathematics, by math-verify: expressions, sets, intervals, matrices, equations.

    It works in a process of its own: computing 9**9**9**9 cannot be interrupted otherwise.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("--answer-type math needs math-verify: pip install math-verify")
        self._executor: ProcessPoolExecutor | None = None

    def _ask(self, question: Callable[..., Any], *texts: str) -> Any:
        """What `question` returns in the other process; None where it takes too long."""
        if self._executor is None:
            self._executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            with children_end_with_us():
                future = self._executor.submit(_within_time, MATH_SECONDS, question, *texts)
            return future.result()
        except BrokenProcessPool:
            self._executor = None
            return None

    def reference(self, text: str) -> "_Mathematics | None":
        return self.extract(text) or self.extract(f"${text}$")

    def extract(self, text: str) -> "_Mathematics | None":
        shown = self._ask(_shown_mathematics, text)
        return _Mathematics(text, shown) if shown is not None else None

    def equal(self, reference: "_Mathematics", answer: "_Mathematics") -> bool:
        return bool(self._ask(_same_mathematics, reference.text, answer.text))


class _Mathematics(NamedTuple):
    """A text with mathematics in it. What it means stays in the other process: to build it here may compute it."""

    text: str
    shown: str

    def __str__(self) -> str:
        return self.shown


def _within_time(seconds: float, question: Callable[..., Any], *texts: str) -> Any:
    """`question(*texts)`. The process is killed (SIGPROF) when it takes more processor time."""
    import math_verify  # noqa: F401  (a second of imports is not the question's)

    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return question(*texts)
    except (RecursionError, MemoryError):
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@functools.lru_cache(maxsize=16)
def _mathematics_in(text: str) -> list[Any]:
    import math_verify

    return math_verify.parse(text)


def _shown_mathematics(text: str) -> str | None:
    found = _mathematics_in(text)
    return str(found) if found else None


def _same_mathematics(reference: str, answer: str) -> bool:
    import math_verify

    return bool(math_verify.verify(_mathematics_in(reference), _mathematics_in(answer)))


def find_number(text: str) -> Fraction | None:
    """The number that `text` gives as its answer: the one after "####", the one in \\boxed{}, or the last one."""
    text = _LATEX_FRACTION.sub(_plain_fraction, text)
    for marked in (_after_hashes(text), _boxed(text)):
        numbers = [] if marked is None else _numbers(marked)
        if numbers:
            return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[Fraction]:
    values = (_value(match) for match in _NUMBER.finditer(text))
    return [value for value in values if value is not None]


def _value(match: re.Match[str]) -> Fraction | None:
    number = match["value"].replace(",", "")
    exponent = number.lower().partition("e")[2]
    if len(match[0]) > 1000 or len(exponent) > 3:  # no answer, and Python refuses to turn it into text
        return None
    value = Fraction(number)
    if match["divisor"]:
        divisor = Fraction(match["divisor"])
        if divisor == 0:
            return None
        value /= divisor
    value += int(match["whole"] or 0)
    return -value if match["sign"] or match["inner_sign"] else value


def _plain_fraction(match: re.Match[str]) -> str:
    follows_digit = match.start() > 0 and match.string[match.start() - 1].isdigit()
    return f"{' ' if follows_digit else ''}{match[1].strip()}/{match[2].strip()}"


def _after_hashes(text: str) -> str | None:
    _, hashes, rest = text.rpartition("####")
    return rest if hashes else None


def _boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, braces balanced."""
    _, command, rest = text.rpartition("\\boxed{")
    if not command:
        return None
    depth = 1
    for i, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:i]
    return rest
