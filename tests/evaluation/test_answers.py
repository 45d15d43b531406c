import functools
from fractions import Fraction

import pytest

from megatron_tpt.evaluation import answers
from megatron_tpt.evaluation.answers import Checker, after_thinking, find_answer, find_number, make_checker


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # GSM8K: working first, the answer after the hashes
        ("He pays 3*8=<<3*8=24>>24 dollars.\n#### 24", 24),
        ("#### 1,200 dollars, not 1,300", 1200),
        ("#### -5", -5),
        ("####18", 18),
        ("first #### 3 and then #### 4", 4),
        ("24 in all\n####", 24),
        ("7 #### none", 7),
        # the last number of running text
        ("The answer is 24.", 24),
        ("24 eggs, of which 9 are left.", 9),
        ("so v2 = 3 + 5 = 8 ; v9 = v2", 8),
        ("16 - 3 - 4 = 9\n9 * 2 = $18", 18),
        # separators, currencies, units, percent
        ("$1,234.50", Fraction("1234.5")),
        ("1,000,000 people", 1_000_000),
        ("1,2,3", 3),
        ("$ 5", 5),
        ("€5.00", 5),
        ("24kg", 24),
        ("50%", 50),
        ("18\\%", 18),
        ("\\$18", 18),
        ("Rs.24", 24),
        # signs
        ("-3", -3),
        ("\u22123", -3),
        ("-$5", -5),
        ("$-5", -5),
        ("a=-3", -3),
        ("(-3)", -3),
        ("9-5", 5),
        ("9 - 5", 5),
        ("(2)-5", 5),
        # decimals and fractions
        ("0.5", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("3.0", 3),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("10 / 4", Fraction(5, 2)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        ("1e3", 1000),
        ("2.5e-1", Fraction(1, 4)),
        # LaTeX
        ("\\boxed{42}, see page 7", 42),
        ("\\boxed{1}, no, \\boxed{\\text{about } 2}", 2),
        ("\\boxed{\\frac{1}{2}} and 7", Fraction(1, 2)),
        ("-\\frac{3}{4}", Fraction(-3, 4)),
        ("2\\dfrac{1}{2}", Fraction(5, 2)),
        ("\\boxed{5", 5),
        # nothing to read
        ("", None),
        ("no idea", None),
        ("v7", None),
        ("x_2 and CO2", None),
        ("3/0", None),
        ("1e999999999", None),
        ("9" * 5000, None),
    ],
)
def test_numbers_are_found(text: str, number: int | Fraction | None) -> None:
    assert find_number(text) == number


@pytest.mark.parametrize("text", ["1" * 100_000, "1 " * 30_000, "1,234" * 20_000, "- " * 50_000, "{" * 100_000])
def test_degenerate_output_is_read_in_no_time(text: str) -> None:
    import time

    start = time.monotonic()
    find_number(text)
    find_number("\\boxed{" + text)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("<think>\n3 + 5 = 8\n</think>\n8\n", "8"),
        ("8", "8"),
        ("working\n</think>\n8", "8"),
        ("<think>a</think>4<think>b</think> 8 ", "8"),
        ("<think>\n3 + 5 = 8", None),
        ("<think>a</think>4<think>b", None),
        ("<think>a</think>\n", None),
        ("", None),
    ],
)
def test_the_answer_stands_after_the_thinking(output: str, answer: str | None) -> None:
    assert find_answer(output, make_checker("exact")) == answer


def test_numbers_in_the_thinking_are_no_answer() -> None:
    checker = make_checker("number")
    assert find_answer("<think>it is 7</think>none", checker) is None
    assert find_answer("<think>it is 7", checker) is None
    assert after_thinking("<think>it is 7</think>none") == "none"


def test_a_pattern_picks_the_last_match() -> None:
    checker = make_checker("exact")
    assert find_answer("Answer: 3. No. Answer: 4.", checker, r"Answer: (\d)") == "4"
    assert find_answer("a1 b2", checker, r"[a-z]\d") == "b2"
    assert find_answer("Answer: ", checker, r"Answer: (\d)?") is None
    assert find_answer("three", checker, r"\d") is None
    assert find_answer("It is 12 (of 30)", make_checker("number"), r"It is (\d+)") == 12


@pytest.mark.parametrize(
    ("reference", "output", "correct"),
    [
        ("... #### 1,200", "That makes $1200.00.", True),
        ("#### 0.5", "half of it, 1/2", True),
        ("#### 24", "24 and 25", False),
        ("#### 3", "2.9999999", False),
    ],
)
def test_numbers_are_compared_exactly(reference: str, output: str, correct: bool) -> None:
    checker = make_checker("number")
    assert checker.equal(checker.reference(reference), find_answer(output, checker)) is correct


@pytest.mark.parametrize(
    ("reference", "output", "correct"),
    [
        ("\\frac{1}{2}", "So it is $\\boxed{0.5}$.", True),
        ("$(x+1)^2$", "$x^2 + 2x + 1$", True),
        ("12", "The answer is 12.", True),
        ("\\{1,2\\}", "$\\boxed{\\{2,1\\}}$", True),
        ("\\sqrt{2}", "$\\boxed{1.5}$", False),
        ("12", "no idea", None),
    ],
)
def test_mathematics_is_compared_by_meaning(reference: str, output: str, correct: bool | None) -> None:
    pytest.importorskip("math_verify")
    checker = shared_checker()
    answer = find_answer(output, checker)
    assert (None if answer is None else checker.equal(checker.reference(reference), answer)) is correct


@functools.cache
def shared_checker() -> Checker:
    """One for all answers: each has a process of its own."""
    return make_checker("math")


def test_an_answer_that_cannot_be_computed_is_unreadable_and_later_ones_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(answers, "MATH_SECONDS", 1.0)
    checker = make_checker("math")
    assert checker.extract("The answer is 9**9**9**9 + 1") is None
    reference, answer = checker.extract("$1/2$"), checker.extract("so it is $0.5$")
    assert reference and answer and checker.equal(reference, answer)
