"""Answers are compared in tiers, strictly."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tpt.grading.compare import same_mathematics
from megatron_tpt.grading.latex import normalize, split_unit

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("reference", "answer", "tier"),
    [
        ("\\frac{1}{2}", "\\dfrac12", "text"),
        ("\\text{Evelyn}", "evelyn", "text"),
        ("\\text{(C)}", "C", "text"),
        ("11,\\! 111,\\! 111,\\! 100", "11111111100", "text"),
        ("10,\\!080", "10{,}080", "text"),
        ("\\$32,\\!348", "32348", "text"),
        ("145^\\circ", "145", "text"),
        ("864 \\mbox{ inches}^2", "864", "text"),
        ("2516_8", "2516", "text"),
        ("8 \\pi", "8π", "text"),
        ("12", "**12**.", "text"),
        ("12", "12 in", "text"),
        ("12", "12\\text{ miles per hour}", "text"),
        ("12", "12\\text{ marbles}", "text"),
        ("12", "12\\text{marbles}", "text"),
        ("12", "12 marbles", "text"),
        ("12", "12kg", "text"),
        ("12", "12dollars", "text"),
        ("12", "12km per hour", "text"),
        ("7", "7\\text{ dozen}", "text"),
        ("3\\pi", "3 pi", "text"),
        ("\\text{Evelyn}", "EVELYN", "text"),
        ("Evelyn", "evelyn", "text"),
        ("10000000", "10\\text{ million}", "number"),
        ("3000000", "3\\text{ million dollars}", "number"),
        ("3.5\\text{ million dollars}", "\\$3500000", "number"),
        ("3000000", "3 million people", "number"),
        ("2\\text{ hundred}\\text{ cm}", "200", "number"),
        ("\\$3000000", "\\$3 million", "number"),
        ("10000", "10 000", "text"),
        ("2x", "f'(x) = 2x", "text"),
        ("f(x)=2 x", "2x", "text"),
        ("5", "x = 5", "text"),
        ("-2,1", "1, -2", "text"),
        ("1,2", "x = 1 \\text{ or } x = 2", "text"),
        ("1 \\pm \\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}", "text"),
        ("\\{1\\pm\\sqrt{5},-2\\}", "-2, 1+\\sqrt5, 1-\\sqrt{5}", "text"),
        ("(-\\infty, 2) \\cup (3, \\infty)", "(3,\\infty)\\cup(-\\infty,2)", "text"),
        ("\\frac{243}{625}", "0.3888", "number"),
        (".0000672", "6.72 \\times 10^{-5}", "number"),
        ("137 \\frac{1}{2}", "137.5", "number"),
        ("045", "45", "number"),
        ("\\frac{270}7\\text{ degrees}", "270/7^\\circ", "number"),
        ("(0,0),(0, \\frac{5}{2})", "(0, 2.5), (0,0)", "number"),
        ("\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}", "\\begin{bmatrix}0.2\\\\-3.6\\end{bmatrix}", "number"),
        ("3\\sqrt{13}", "\\sqrt{117}", "math-verify"),
        ("6 - 5i", "-5i + 6", "math-verify"),
        ("(a+5)(b+2)", "ab+2a+5b+10", "math-verify"),
        ("\\frac{x}{2}", "0.5x", "math-verify"),
        ("(3,4]", "3 < x \\le 4", "math-verify"),
        ("5x - 7y + 11z + 4 = 0", "11z + 5x - 7y = -4", "math-verify"),
        ("2^{25} \\cdot 26!", "26! \\cdot 2^{25}", "math-verify"),
        ("x \\in [-2,7]", "x \\in [-2,\\frac{14}{2}]", "math-verify"),
        ("x \\in [-2,7]", "-2 \\le x \\le 7", "math-verify"),
        ("y = 2x + 3", "2y - 4x = 6", "math-verify"),
        ("1, \\sqrt{2}", "\\frac{2}{\\sqrt{2}}, 1", "math-verify"),
    ],
)
def test_equal_answers_are_accepted_by_the_first_tier_that_can(reference: str, answer: str, tier: str) -> None:
    assert same_mathematics(reference, answer) == tier


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        # what bare LaTeX is misread as
        ("3\\sqrt{13}", "3"),
        ("6 - 5i", "5"),
        ("1,-2", "1"),
        ("11,13", "11.13"),
        ("2^{25} \\cdot 26!", "26"),
        # some values of a list, or several answers
        ("3, 5, 7", "3, 5"),
        ("3", "3 or 4"),
        ("3", "\\text{either } 3 \\text{ or } 4"),
        ("144", "143, 144, 145"),
        ("3", "3 \\text{ or more}"),
        ("8", "8 \\text{ to } 9"),
        ("1,1,2", "1,2,2"),
        # rounded
        ("\\sqrt{2}", "1.41421356237309504880"),
        ("\\pi", "3.14159265358979323846"),
        ("\\frac13", "0.3333333333333333"),
        ("\\frac{\\sqrt{2}}{x}", "\\frac{1.41421356}{x}"),
        # tiny
        ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
        ("x", "x + 10^{-20}"),
        ("0", "10^{-30}"),
        ("\\sqrt{2}", "\\sqrt{2} + 10^{-30}"),
        # other brackets, units, symbols, bases
        ("(1,2)", "[1,2]"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "1,2"),
        ("5 \\text{ cm}", "5 \\text{ m}"),
        ("2516_8", "2516_7"),
        ("50\\%", "0.5"),
        ("a", "A"),
        ("5 \\text{ cm}", "5 \\text{ km}"),
        ("x=5", "y=5"),
        # no units
        ("3xy", "3"),
        ("3", "3ab"),
        ("12", "12xy"),
        ("3", "3abcd"),
        ("3abcd", "3"),
        ("3", "3apples"),
        ("3000000", "3\\text{ million more}"),
        ("3", "3\\text{ million dollars}"),
        ("3\\text{ million dollars}", "3\\text{ million euros}"),
        ("3", "3 pi"),
        ("5", "5 squared"),
        ("2", "2 sin"),
        ("\\frac{3}{4}", "3/4 ab"),
        ("5", "5 i"),
        ("2", "2n"),
        ("2", "2\\text{ if n is even}"),
        ("2", "2\\text{ except when } n = 1"),
        ("10", "10\\text{ million}"),
        ("5", "5\\text{ squared}"),
        # names and digits
        ("a-b", "A-B"),
        ("xyz", "XYZ"),
        ("-ab", "-AB"),
        ("12", "1 2"),
        ("34", "3 4"),
        ("D", "D_3"),
        ("A", "A_4"),
        ("3", "3'"),
        ("1", "1_000"),
        ("x=5", "-x=5"),
        ("x \\in [-2,7]", "x \\in [-2,8]"),
        ("y = 2x + 3", "-y = 2x + 3"),
        ("(-\\infty, 0]", "[-\\infty, 0]"),
        ("(5,\\infty)", "[5,\\infty)"),
        ("10", "10 + x"),
        ("1", "x > 1"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\end{pmatrix}"),
        ("\\text{even}", "\\text{odd}"),
        ("7", "\\boxed{"),
        ("7", "9" * 100_000),
    ],
)
def test_other_answers_are_refused(reference: str, answer: str) -> None:
    assert same_mathematics(reference, answer) is None


@pytest.mark.parametrize("answer", ["5" + "\\text{cm}" * 200 + "!", "5" + " cm" * 600 + "!", "5" + " " * 1900 + "!"])
def test_units_are_read_in_no_time(answer: str) -> None:
    start = time.process_time()
    assert split_unit(normalize(answer)) == (normalize(answer), "")
    assert time.process_time() - start < 2


_NUMBERS = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=1000)


@given(st.lists(_NUMBERS, min_size=1, max_size=5), st.randoms(use_true_random=False), st.integers(0, 4), _NUMBERS)
@settings(max_examples=50, deadline=None)
def test_a_list_is_its_values_in_any_order_and_no_others(
    values: list[object], random: object, place: int, other: object
) -> None:
    reference = ", ".join(map(str, values))
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert same_mathematics(reference, ", ".join(map(str, shuffled))) in ("text", "number")
    assert same_mathematics(reference, ", ".join(map(str, [*values, other]))) is None
    changed = [other if i == place % len(values) else value for i, value in enumerate(values)]
    same = sorted(map(str, changed)) == sorted(map(str, values))
    assert (same_mathematics(reference, ", ".join(map(str, changed))) is not None) is same


@given(st.text(alphabet="0123456789()[]{},\\$^_ afrctexsqp.+-=<>", max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_text_breaks_the_comparison_as_text(text: str) -> None:
    from megatron_tpt.grading.latex import key, normalize, parts, split_unit

    once = normalize(text)
    split_unit(once), parts(once)
    assert key(normalize(once)) == key(normalize(normalize(once)))
