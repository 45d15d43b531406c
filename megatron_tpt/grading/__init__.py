"""Grading: one answer is found in a model's text and compared with the reference. Shared by evaluation and rewards.

Extraction (extract.py), kinds of answers (kinds.py), comparison of mathematics (compare.py, latex.py, numeric.py), code
in a sandbox (sandbox.py), and worker processes that may hang or crash (pool.py).
May import the single modules alone: no torch, no records, so that a reward can grade wherever it runs.
"""

from megatron_tpt.grading.extract import Reading, after_thinking, opens_thinking
from megatron_tpt.grading.grader import Grade, Grader, Item, Rules
from megatron_tpt.grading.kinds import LETTERS, AnswerKind, reference_text
from megatron_tpt.grading.pool import GraderPool

__all__ = [
    "LETTERS", "AnswerKind", "Grade", "Grader", "GraderPool", "Item", "Reading", "Rules", "after_thinking",
    "opens_thinking", "reference_text"
]  # fmt: skip
