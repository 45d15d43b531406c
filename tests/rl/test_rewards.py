"""Rewards in addition to that of the answer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tpt.errors import UserError
from megatron_tpt.rl.rewards import format_reward, length_penalty, overlong_penalty


@given(st.lists(st.integers(1, 100), min_size=1), st.integers(1, 100), st.sampled_from([0.5, 1.0]))
def test_the_overlong_penalty_is_that_of_dapo(lengths: list[int], buffer: int, factor: float) -> None:
    """As verl's reward manager of that name writes it, for lengths up to the limit."""
    expected = [min(-(length - (100 - buffer)) / buffer * factor, 0) for length in lengths]
    result = overlong_penalty(torch.tensor(lengths), max_length=100, buffer=buffer, factor=factor)
    assert result.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_overlong_penalty_is_at_most_its_factor() -> None:
    assert overlong_penalty(torch.tensor([120]), max_length=100, buffer=20, factor=0.5).tolist() == [-0.5]


@pytest.mark.parametrize("buffer", [0, 101])
def test_a_buffer_that_does_not_fit_is_refused(buffer: int) -> None:
    with pytest.raises(UserError, match=f"cannot begin {buffer} tokens before the limit of 100"):
        overlong_penalty(torch.tensor([1]), max_length=100, buffer=buffer)


@given(st.lists(st.tuples(st.integers(0, 200), st.booleans()), min_size=1), st.floats(0, 1))
def test_length_makes_no_wrong_answer_better_and_no_right_one_worse_than_wrong(
    rollouts: list[tuple[int, bool]], factor: float
) -> None:
    lengths = torch.tensor([length for length, _ in rollouts])
    is_correct = torch.tensor([correct for _, correct in rollouts])
    penalties = length_penalty(lengths, is_correct, max_length=100, factor=factor)
    assert not penalties[~is_correct].any()
    assert (is_correct + penalties >= 0).all() and (penalties <= 0).all()


def test_the_length_penalty_is_proportional_to_the_length_of_right_answers() -> None:
    penalties = length_penalty(torch.tensor([10, 40, 40]), torch.tensor([True, True, False]), max_length=80, factor=0.8)
    assert penalties.tolist() == pytest.approx([-0.1, -0.4, 0])


def test_a_length_penalty_that_could_outweigh_the_answer_is_refused() -> None:
    with pytest.raises(UserError, match=r"factor is 1.5"):
        length_penalty(torch.tensor([1]), torch.tensor([True]), max_length=10, factor=1.5)


@pytest.mark.parametrize(
    ("output", "opened", "expected"),
    [
        ("<think>\n1 + 1\n</think>\n2", False, 1),
        ("1 + 1\n</think>\n2", True, 1),
        ("1 + 1\n</think>\n2", False, 0),  # not opened
        ("<think>1 + 1</think>2", True, 0),  # opened twice
        ("Well. <think>1 + 1</think>2", False, 0),  # text before it
        ("<think>1 + 1", False, 0),  # truncated
        ("1 + 1", True, 0),
        ("<think>1 + 1</think>\n", False, 0),  # no answer
        ("<think> \n</think>2", False, 0),  # no thinking
        ("<think>1 + 1</think>2</think>2", False, 0),
        ("<think>1 + 1</think>2<think>3</think>", False, 0),
        ("<think>1<think>1</think>2", False, 0),
        ("2", False, 0),
        ("", True, 0),
    ],
)
def test_the_format_is_thinking_and_then_an_answer(output: str, opened: bool, expected: float) -> None:
    assert format_reward(output, opened) == expected
