"""Grade outputs: strip the thinking, find the candidate, compare it with the reference."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_tpt.errors import UserError
from megatron_tpt.grading import extract
from megatron_tpt.grading.compare import Tier
from megatron_tpt.grading.extract import Reading
from megatron_tpt.grading.instructions import Instructions
from megatron_tpt.grading.kinds import AnswerKind, Kind, make_kind
from megatron_tpt.grading.sandbox import Sandbox

Reason = Literal["no answer", "thinking not closed", "different", "failed", "time-out", "crash"]


@dataclass(frozen=True)
class Rules:
    """How the outputs of one benchmark are graded."""

    kind: AnswerKind = "exact"
    reading: Reading = field(default_factory=Reading)
    allow_unsandboxed_code: bool = False
    code_time_limit_s: float = 10.0
    """Processor time for one program and its tests."""


@dataclass(frozen=True)
class Item:
    """An output to grade. Everything in it is plain data."""

    output: str
    reference: Any
    """As the row has it: text, number, boolean or list. For code: the tests, as text or as a list of statements. For
    instructions: an object with their names and arguments."""
    choices: tuple[str, ...] = ()
    """The texts of the options, A first."""
    thinking_opened: bool = False
    """Whether the prompt ended in "<think>"."""
    code_prefix: str = ""
    """What goes before the code of an answer, such as HumanEval's prompt."""


@dataclass(frozen=True)
class Grade:
    """The verdict on one output."""

    correct: bool
    tier: Tier | None = None
    """What decided that the answer is right; None for a wrong one."""
    extracted: str | None = None
    """The candidate; None when there is none."""
    reason: Reason | None = None
    """Why the output is wrong; None for a right one."""
    detail: str = ""
    """More on the reason, such as the exception of a program."""


class Grader:
    """Grades in this process, without a limit of time: use GraderPool for what models wrote.

    Raises UserError when a library or the sandbox is missing.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._kind: Kind | None = None if rules.kind == "code" else make_kind(rules.kind)
        self._sandbox = Sandbox(rules.allow_unsandboxed_code, rules.code_time_limit_s) if rules.kind == "code" else None

    def reference(self, value: Any, choices: Sequence[str] = ()) -> Any | None:
        """A reference as it is compared; None when it cannot be read."""
        if self._kind is not None:
            return self._kind.reference(value, choices)
        tests = "\n".join(map(str, value)) if isinstance(value, list) else value
        return tests if isinstance(tests, str) and tests.strip() else None

    def grade(self, item: Item) -> Grade:
        """The verdict on `item`. Raises UserError for a reference that cannot be read."""
        reference = self.reference(item.reference, item.choices)
        if reference is None:
            raise UserError(f"the reference answer {str(item.reference)[:60]!r} cannot be read")
        text = extract.after_thinking(item.output, item.thinking_opened)
        if text is None:
            return Grade(False, reason="thinking not closed")
        reading = self._rules.reading
        part = extract.readable(text, reading)
        if part is None:
            return Grade(False, reason="no answer")
        if self._kind is None:
            return self._grade_code(part, reference, item.code_prefix)
        candidate = self._kind.candidate(part, reading, item.choices)
        if candidate is None:
            return Grade(False, reason="no answer")
        tier = self._kind.same(reference, candidate)
        missed = self._kind.missed(reference, candidate) if isinstance(self._kind, Instructions) else []
        return Grade(tier is not None, tier, candidate, None if tier else "different", ", ".join(missed))

    def _grade_code(self, text: str, tests: str, prefix: str) -> Grade:
        assert self._sandbox is not None
        code = extract.last_code_block(text)
        if code is None and (self._rules.reading.first or prefix):
            code = text.partition("```")[0]  # a base model continues where the prompt ends
        if code is None or not code.strip():
            return Grade(False, reason="no answer")
        result = self._sandbox.run(_program(prefix, code), tests)
        if result.status == "passed":
            return Grade(True, "tests", code)
        return Grade(False, None, code, result.status, result.detail)


def _program(prefix: str, code: str) -> str:
    """The prefix and the code; imports from __future__ must come first."""
    future = re.compile(r"^from __future__ import [^\n]*\n", re.M)
    return "".join(future.findall(code)) + prefix + future.sub("", code)
