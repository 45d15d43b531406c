"""Every kind of answer: its references, its candidates, and when they are the same."""

from typing import Any

import pytest

from megatron_tpt.grading import Grader, Item, Reading, Rules
from megatron_tpt.grading.kinds import make_kind

OPTIONS = ("red", "dark blue", "12", "$\\frac{1}{2}$")


def grade(kind: Any, reference: Any, output: str, **item: Any) -> bool:
    return Grader(Rules(kind)).grade(Item(output, reference, **item)).correct


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("The answer is (B).", "B"),
        ("the answer is B because it is", "B"),
        ("The answer is **(B)**.", "B"),
        ("The answer is $\\boxed{\\text{B}}$", "B"),
        ("\\boxed{\\text{(B) dark blue}}", "B"),
        ("\\boxed{B}", "B"),
        ("Answer: b) dark blue", None),  # an uncertain reading is none
        ("Answer: (b)", "B"),
        ("B. dark blue", "B"),
        ("(B)", "B"),
        ("B", "B"),
        ("The answer is dark blue.", "B"),
        ("The answer is 12.", "C"),
        ("\\boxed{1/2}", None),  # text alone is compared with the options
        ("\\boxed{\\frac12}", "D"),
        ("The correct answer is Option C.", "C"),
        ("The answer is **Choice (C)**", "C"),
        ("The answer is the letter C.", "C"),
        ("\\boxed{\\text{Option C}}", "C"),
        ("\\boxed{C. A house}", "C"),
        ("\\boxed{C. A Tale of Two Cities}", "C"),
        ("The answer is C: I know it", "C"),
        ("The answer is B because A is wrong.", "B"),
        ("The answer is (A) or (B).", None),
        ("\\boxed{A \\text{ and } B}", None),
        ("\\boxed{A\\text{ or }C}", None),
        ("\\boxed{\\text{A and B}}", None),
        ("\\boxed{\\text{A}, \\text{B}}", None),
        ("\\boxed{A \\& C}", None),
        ("\\boxed{A; B}", None),
        ("\\boxed{A B}", None),
        ("\\boxed{A B and C}", None),
        ("\\boxed{A + B}", None),
        ("The answer is A as well as B.", None),
        ("The answer is Options A and B.", None),
        ("The answer is a good one.", None),
        ("The answer is A good one.", None),
        ("The answer is (G).", None),  # there is no such option
        ("I think so", None),
        ("", None),
    ],
)
def test_a_choice_is_a_letter_or_the_text_of_an_option(output: str, letter: str | None) -> None:
    assert make_kind("choice").candidate(output, Reading(), OPTIONS) == letter


def test_ten_letters_are_known_without_the_options() -> None:
    assert make_kind("choice").candidate("The answer is (J).\n\nThe answer is (A).", Reading(first=True)) == "J"


@pytest.mark.parametrize("kind", ["number", "math"])
@pytest.mark.parametrize(
    ("output", "is_read"),
    [
        ("So it is not 5.", False),
        ("The total is not $5$.", False),
        ("It isn't equal to 5", False),
        ("It can't be exactly -5.", False),
        ("I do not know why, but it is 5.", True),
        ("He does not eat 3, so 5", True),
        ("It is not 3 but 5.", True),
    ],
)
def test_a_last_number_that_is_denied_is_no_answer(kind: Any, output: str, is_read: bool) -> None:
    assert (make_kind(kind).candidate(output, Reading()) is not None) == is_read


@pytest.mark.parametrize(
    ("value", "letter"),
    [("B", "B"), ("(b)", "B"), (1, "B"), ("dark blue", "B"), (4, None), ("E", None), ("1", None), (True, None)],
)
def test_references_of_choices(value: Any, letter: str | None) -> None:
    assert make_kind("choice").reference(value, OPTIONS) == letter


@pytest.mark.parametrize(
    ("reference", "output", "correct"),
    [
        (True, "The answer is yes.", True),
        (False, "The answer is yes.", False),
        ("no", "No, it is not.", True),
        ("True", "\\boxed{\\text{True}}", True),
        (True, "It has no moons, so: yes", True),
        (False, "There is no evidence of that", False),  # "no" among other words is no answer
        (True, "The answer is yes or no.", False),
        (True, "The statement is not true", False),
        (False, "So it is not false", False),
        (False, "The statement isn't false.", False),
        (False, "No doubt that this is true", False),
        (False, "The answer is no doubt yes.", False),
        (True, "The answer is yes, no", False),
        (True, "Yes/No", False),
        (False, "The answer is no because there is none.", True),
        (False, "No, false.", True),
        (False, "No\nIs it true or false?", True),
        (True, "The answer is yes, no doubt about it.", True),
        (True, "\\text{Yes}", True),
        (True, "It is not a moon. So it is true.", True),
        (False, "", False),
    ],
)
def test_booleans_are_yes_or_no(reference: Any, output: str, correct: bool) -> None:
    assert grade("boolean", reference, output) is correct


@pytest.mark.parametrize(
    ("reference", "output", "correct"),
    [
        ("ACD", "The answer is A, C and D.", True),
        ("ACD", "\\boxed{DCA}", True),
        ("ACD", "\\boxed{\\text{A, C}}", False),
        ("AC", "\\boxed{A, C, D}", False),
        ("B", "The answer is (B).", True),
        ("5", "\\boxed{5}", True),
        ("5", "\\boxed{5.005}", False),
        ("0.24", "The answer is $0.245$ eV.", True),
        ("0.24", "\\boxed{0.26}", False),
        ("6.00", "\\boxed{6.004}", True),
        ("6.00", "\\boxed{6.02}", False),
        (6.0, "\\boxed{5.995}", True),
        (6, "\\boxed{6.004}", False),
        ("6", "\\boxed{6.0}", True),
        ("5.56", "\\boxed{A}", False),
    ],
)
def test_jee_wants_all_letters_or_the_number(reference: Any, output: str, correct: bool) -> None:
    assert grade("jee", reference, output) is correct


@pytest.mark.parametrize(
    ("reference", "output", "correct"),
    [
        ("[1, 2]", " [1,2]\n", True),
        ("'a\"b'", '"a\\"b"', True),
        ("{'b': 1, 'a': (2,)}", "{'a': (2,), 'b': 1}", True),
        ("1", "1.0", True),  # as Python compares, and CRUXEval with it
        ("(1, 2)", "[1, 2]", False),
        ("'abc'", "abc", False),
        ("[]", "list()", False),  # code is not run
        ("None", "none", False),
        ("'x'", "[" * 5000, False),
        ("'x'", "1" * 10_000, False),
    ],
)
def test_literals_are_compared_as_python_does(reference: str, output: str, correct: bool) -> None:
    assert grade("literal", reference, output) is correct


def test_exact_texts_may_have_alternatives_and_mathematics_all_values() -> None:
    assert grade("exact", ["NYC", "New York"], " New York\n")
    assert not grade("exact", ["NYC", "New York"], "Paris")
    assert grade("exact", 2, "2")
    pytest.importorskip("math_verify")
    assert grade("math", ["$8$", "$4$"], "\\boxed{4, 8}")
    assert not grade("math", ["$8$", "$4$"], "\\boxed{4}")
    assert grade("math", ["$(-\\infty,-5)$"], "\\boxed{(-\\infty,-5)}")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("number", "one"),
        ("number", [1, 2]),
        ("number", True),
        ("number", "3\\sqrt{2}"),
        ("number", "3 or 4"),
        ("number", "no idea, maybe in 2024"),
        ("number", {"a": 3, "b": 4}),
        ("number", {"a": "x", "b": 4}),
        ("math", {"a": 3}),
        ("exact", {"a": 3}),
        ("exact", None),
        ("boolean", "maybe"),
        ("jee", "E"),
        ("math", ""),
        ("exact", []),
        ("literal", "f(x)"),
    ],
)
def test_references_that_cannot_be_read_are_known(kind: Any, value: Any) -> None:
    assert Grader(Rules(kind)).reference(value) is None


@pytest.mark.parametrize(
    ("value", "number"),
    [("2 + 1 = 3\n#### 3", "3"), ("2 + 1 = 3\nA: 3", "3"), ("24 eggs", "24"), ("Rs. 24", "24"), ("x = 24", "24"),
     (1e-07, "1/10000000"), ("$1,200.50", "2401/2"), (" \\boxed{7} ", "7"), ([7], "7")],
)  # fmt: skip
def test_references_of_numbers(value: Any, number: str) -> None:
    assert str(make_kind("number").reference(value)) == number


@pytest.mark.parametrize(
    ("output", "correct"),
    [
        ("The answer is not 5.", False),
        ("The answer is not $5$.", False),
        ("The answer is less than 5.", False),
        ("The answer is half of 5.", False),
        ("The answer is the square root of 5.", False),
        ("The answer is 5 or more.", False),
        ("The answer is minus 5.", False),
        ("The answer is 5 inches.", True),
        ("\\boxed{\\boxed{5}}", True),
    ],
)
def test_words_around_a_stated_number_may_change_it(output: str, correct: bool) -> None:
    pytest.importorskip("math_verify")
    assert grade("math", "5", output) is correct
    assert grade("math", "-5", output) is ("minus" in output)


def test_the_verdict_says_what_was_found_and_why() -> None:
    grader = Grader(Rules("number"))
    right = grader.grade(Item("so it is 1,200", "#### 1200"))
    assert (right.correct, right.tier, right.extracted, right.reason) == (True, "number", "1200", None)
    wrong = grader.grade(Item("it is 3", "4"))
    assert (wrong.correct, wrong.tier, wrong.extracted, wrong.reason) == (False, None, "3", "different")
    assert grader.grade(Item("no idea", "4")).reason == "no answer"
    assert grader.grade(Item("<think>it is 4", "4")).reason == "thinking not closed"
    assert grader.grade(Item("it is 4", "4", thinking_opened=True)).reason == "thinking not closed"
