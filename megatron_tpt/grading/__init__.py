"""Grading: one answer is found in a model's text and compared with the reference. Shared by evaluation and rewards."""

from megatron_tpt.grading.extract import Reading, after_thinking, opens_thinking
from megatron_tpt.grading.grader import Grade, Grader, Item, Rules
from megatron_tpt.grading.kinds import LETTERS, AnswerKind
from megatron_tpt.grading.pool import GraderPool

__all__ = [
    "LETTERS", "AnswerKind", "Grade", "Grader", "GraderPool", "Item", "Reading", "Rules", "after_thinking",
    "opens_thinking"
]  # fmt: skip
