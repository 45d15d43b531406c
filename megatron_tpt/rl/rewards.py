"""Rewards of whole rollouts in addition to that of the answer, which the grading package computes.

Penalties are tensors [B], 0 or less, to be added to the reward of the answer. Lengths are those of responses in tokens.
"""

from torch import Tensor

from megatron_tpt.errors import require
from megatron_tpt.think_tags import CLOSE_TAG, OPEN_TAG


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int, factor: float = 1.0) -> Tensor:
    """The soft overlong punishment of DAPO, arXiv 2503.14476, equation 13, times `factor`; fp32 [B].

    0 for lengths [B] up to max_length - buffer, -1 at max_length, and linear in between. Raises UserError for a buffer
    that does not fit in max_length.
    """
    require(
        0 < buffer <= max_length,
        f"the soft overlong penalty cannot begin {buffer} tokens before the limit of {max_length}: give 1 or more",
    )
    return -factor * ((lengths.float() - (max_length - buffer)) / buffer).clamp(0, 1)


def length_penalty(lengths: Tensor, is_correct: Tensor, *, max_length: int, factor: float) -> Tensor:
    """-factor length / max_length for rollouts whose answer is correct (bool [B]), 0 for all others; fp32 [B].

    Wrong answers have none: penalized by length, a short wrong answer would be better than a long one, and the policy
    would learn to give up. Raises UserError for a factor above 1, with which a long correct answer could be
    worth less than a wrong one.
    """
    require(0 <= factor <= 1, f"the length penalty's factor is {factor}: it must be from 0 to 1")
    return -factor * (lengths.float() / max_length).clamp(max=1).where(is_correct, 0)


def format_reward(output: str, opened: bool = False) -> float:
    """1 for "<think>", some thinking, "</think>" and some answer, in this order and once each; else 0.

    `opened` says that the prompt has already opened the thinking (grading.opens_thinking): the output begins inside it.
    Special tokens other than the tags are not part of `output`.
    """
    before, closed, answer = output.partition(CLOSE_TAG)
    start, found, thinking = ("", OPEN_TAG, before) if opened else before.partition(OPEN_TAG)
    in_order = bool(closed and found and not start.strip())
    once = OPEN_TAG not in thinking and OPEN_TAG not in answer and CLOSE_TAG not in answer
    return float(in_order and once and bool(thinking.strip()) and bool(answer.strip()))
