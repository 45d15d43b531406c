"""Where thinking is cut, and what is put behind a cut."""

import random
import re
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tpt.errors import UserError
from megatron_tpt.rl.repro import Cuts, answer_suffix, choose_cuts

TEXT = "A first idea.\nIs it right?\nNo. Not quite\n\nSo: 4.5 it is.\n\n\nSure\n</think>\n\nThe answer:\n\n4.\nReally."
SEGMENTS = ["A first idea.\n", "Is it right?\n", "No. Not quite\n\n", "So: 4.5 it is.\n\n\n", "Sure\n</think>"]


def pieces_of(text: str, pattern: str) -> list[str]:
    return re.findall(pattern, text, re.DOTALL)


def cut_text(pieces: list[str], cuts: Cuts) -> list[str]:
    """The segments between the cuts."""
    return ["".join(pieces[i:j]) for i, j in pairwise(cuts.positions)]


@pytest.mark.parametrize(
    "pattern",
    [
        r"</think>|.",  # characters
        r"</think>|[.?]\n+|\n+|[ ]?\w+|.",  # ".\n", ".\n\n\n" and "\n\n" are one token each
        r"</think>|\n|[ ]?\w+[.?]?|.",  # "." with the word, every "\n" a token
        r"</th|ink>|\n\n|[ ]?\w+|.",  # the tag is two tokens
    ],
)
def test_segments_are_the_same_whatever_the_tokens_are(pattern: str) -> None:
    pieces = pieces_of(TEXT, pattern)
    assert "".join(pieces) == TEXT
    cuts = choose_cuts(pieces, [0.0] * len(pieces), 20)
    assert cut_text(pieces, cuts) == SEGMENTS
    assert cuts.positions[0] == 0 and cuts.is_closed


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1))
def test_a_token_that_is_part_of_two_segments_begins_the_second(seed: int, share: float) -> None:
    """Any tokens: a cut is at the token with the segment's first character."""
    dice = random.Random(seed)
    borders = [0, *(i for i in range(1, len(TEXT)) if dice.random() < share), len(TEXT)]
    pieces = [TEXT[i:j] for i, j in pairwise(borders)]
    beginnings = [TEXT.index(segment) for segment in SEGMENTS[1:]]
    tokens = {max(i for i, border in enumerate(borders) if border <= beginning) for beginning in beginnings}
    closing = TEXT.index("</think>") + len("</think>")
    end = min((i for i, border in enumerate(borders) if border >= closing), default=len(pieces))
    expected = sorted({0, *(token for token in tokens if 0 < token < end), end})
    assert choose_cuts(pieces, [0.0] * len(pieces), 20).positions == expected


def test_a_full_stop_alone_is_no_boundary() -> None:
    """In tokenizers that split ".\\n", the first id of it is that of every full stop."""
    pieces = ["One", ".", " Two", ".", "\n", "Three", ".", "</think>"]
    assert choose_cuts(pieces, [0.0] * 8, 20).positions == [0, 5, 8]


def test_thinking_that_never_ends_goes_to_the_end() -> None:
    pieces = ["One", ".\n", "Two", ".\n"]
    assert choose_cuts(pieces, [0.0] * 4, 20) == Cuts([0, 2, 4], is_closed=False)


def test_thinking_begins_behind_its_tag_if_the_model_writes_it() -> None:
    pieces = ["<think>", "\n", "One", ".\n", "Two", "</think>", "\n\n", "4"]
    assert choose_cuts(pieces, [0.0] * 8, 20) == Cuts([1, 4, 6], is_closed=True)


@pytest.mark.parametrize(
    ("pieces", "positions"),
    [(["</think>", "4"], [0, 1]), (["<think>"], [1]), (["<think>", "</think>"], [1, 2])],
)
def test_rollouts_that_hardly_think(pieces: list[str], positions: list[int]) -> None:
    assert choose_cuts(pieces, [0.0] * len(pieces), 20).positions == positions


def test_segments_of_the_highest_entropies_are_kept_in_the_order_of_the_text() -> None:
    """Besides both ends, whose entropies do not matter; of equal ones the earlier."""
    pieces = [*("word", ".\n") * 6, "</think>"]
    entropies = [9, 9, 1.0, 9, 3.0, 9, 2.0, 9, 2.0, 9, 0.5, 9, 9]
    assert choose_cuts(pieces, entropies, 2).positions == [0, 4, 6, 13]
    assert choose_cuts(pieces, entropies, 3).positions == [0, 4, 6, 8, 13]
    assert choose_cuts(pieces, entropies, 0).positions == [0, 13]


def encoder(*, adds_special_tokens: bool = False) -> Callable[[str], list[int]]:
    """Bytes as tokens; 256 begins a sequence."""
    return lambda text: [256] * adds_special_tokens + list(text.encode())


def texts(suffix: tuple[list[int], list[int]]) -> tuple[str, ...]:
    return tuple(bytes(part).decode() for part in suffix)


@pytest.mark.parametrize("is_closed", [False, True])
def test_all_tokens_of_the_template_are_scored(is_closed: bool) -> None:
    """As the authors have it: the template inside of the thinking, and nothing before it."""
    suffix = answer_suffix(encoder(), "42", prefix="", template="\\boxed{{{}}}", is_closed=is_closed)
    assert texts(suffix) == ("", "\\boxed{42}")


def test_a_prefix_that_closes_the_thinking_does_not_close_it_twice() -> None:
    options = {"prefix": "\n</think>\nAnswer:", "template": " {}"}
    assert texts(answer_suffix(encoder(), "42", **options, is_closed=False)) == ("\n</think>\nAnswer:", " 42")
    assert texts(answer_suffix(encoder(), "42", **options, is_closed=True)) == ("\nAnswer:", " 42")


def test_an_encoder_that_adds_special_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="encode it without"):
        answer_suffix(encoder(adds_special_tokens=True), "42", prefix="", template="{}", is_closed=True)


@pytest.mark.parametrize("template", ["\\boxed{}}", "the answer", "{} or {}", "{answer}"])
def test_a_template_without_one_place_for_the_answer_is_refused(template: str) -> None:
    with pytest.raises(UserError, match=r'must have one "[{][}]" for the answer'):
        answer_suffix(encoder(), "42", prefix="", template=template, is_closed=True)
