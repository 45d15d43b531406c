"""Numbers are read exactly, and only where the text gives one."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tpt.grading import Reading
from megatron_tpt.grading.kinds import find_number
from megatron_tpt.grading.numeric import rational


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
        ("#### Step 2\nIt is \\boxed{7}.", 7),
        ("#### $1{,}000", 1000),
        # the last number of running text
        ("The answer is 24.", 24),
        ("24 eggs, of which 9 are left.", 9),
        ("The answer is 24 eggs, of which 9 are left.", 24),
        ("The answer is 9 * 2 = 18 dollars.", 18),
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
        ("\u20133", -3),  # an en dash
        ("3\u20135", 5),
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
        ("\\boxed{1{,}000}", 1000),
        ("\\boxed{1\\,000}", 1000),
        ("\\boxed{\\frac12}", Fraction(1, 2)),
        ("\\boxed{10^3}", 1000),
        ("\\boxed{10^{500}}", 10**500),
        ("\\boxed{x = 5}", 5),
        ("\\boxed{24 \\text{ eggs}}", 24),
        ("\\boxed{-\\$5}", -5),
        ("-\\frac{3}{4}", Fraction(-3, 4)),
        ("2\\dfrac{1}{2}", Fraction(5, 2)),
        ("\\boxed{\\boxed{5}}", 5),
        ("\\boxed{\\fbox{\\frac{1}{2}}}", Fraction(1, 2)),
        # chains of equalities
        ("\\boxed{9 \\cdot 2 = 18}", 18),
        ("#### 10 + 8 = 18", 18),
        ("The answer is, in total, 9 * 2 = 18.", 18),
        # words
        ("The answer is negative 5.", -5),
        ("The answer is minus $5$.", -5),
        ("The total is negative 5 dollars.", -5),
        ("The answer is -$5$.", -5),
        ("The answer is minus $5.", -5),
        ("The answer is $3 million.", 3_000_000),
        ("\\boxed{3 \\text{ million}}", 3_000_000),
        ("There are 2.5 thousand of them.", 2500),
        ("She eats 84/12 = 7 dozen eggs.", 7),
        ("So it is 1½ cups.", Fraction(3, 2)),
        ("Half of it is ½.", Fraction(1, 2)),
        ("The answer is 5 more apples.", 5),
        ("The answer is 24 eggs, not the 9 that are left.", 24),
        ("The answer is the 5th.", 5),
        ("The answer is the least common multiple, 12.", 12),
        ("The answer is the number of roots, 3.", 3),
        # more or less than one number
        ("\\boxed{x=3 \\text{ or } x=4}", None),
        ("\\boxed{x = 3, y = 4}", None),
        ("The answer is $x = 3$ and $y = 4$.", None),
        ("The answer is x = 3, y = 4.", None),
        ("The answer is 3, 4.", None),
        ("\\boxed{3 or x = 4}", None),
        ("\\boxed{x != 18}", None),
        ("\\boxed{x >= 18}", None),
        ("\\boxed{x \\neq 18}", None),
        ("\\boxed{x <= 18}", None),
        ("#### 18 or 20", None),
        ("The answer is not 5.", None),
        ("The answer is not $5$.", None),
        ("The answer is x minus 5.", None),
        ("The answer is less than 5.", None),
        ("The answer is at least 5.", None),
        ("The answer is 5 or more.", None),
        ("The answer is half of 10.", None),
        ("The answer is 5 and a half.", None),
        ("The answer is 5 squared.", None),
        ("The answer is the square root of 5.", None),
        ("\\boxed{5!}", None),
        ("\\boxed{2x}", None),
        ("\\boxed{-(-5)}", None),
        ("\\boxed{1 2}", None),
        ("\\boxed{5", None),
        ("\\boxed{}", None),
        ("\\boxed{3 \\text{ or } 4}", None),
        ("\\boxed{3, 4}", None),
        ("\\boxed{3\\sqrt{2}}", None),
        ("\\boxed{\\sqrt{2}}", None),
        ("\\boxed{10 + x}", None),
        ("The answer is either 3 or 4.", None),
        ("", None),
        ("no idea", None),
        ("v7", None),
        ("x_2 and CO2", None),
        ("3/0", None),
        ("1e999999999", None),
        ("\\boxed{1e9999}", None),  # more digits than Python turns into text
        ("\\boxed{10^{4500}}", None),
        ("\\boxed{" + "0" * 3000 + "}", None),
        ("9" * 5000, None),
    ],
)
def test_numbers_are_found(text: str, number: int | Fraction | None) -> None:
    found = find_number(text, Reading())
    assert found == (None if number is None else str(Fraction(number)))


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_a_number_equals_itself_however_it_is_written(top: int, bottom: int) -> None:
    value = Fraction(top, bottom)
    sign = "-" if top < 0 else ""
    assert rational(f"{top}/{bottom}") == value
    assert rational(f"{sign}\\dfrac{{{abs(top)}}}{{{bottom}}}") == value
    assert rational(f"{top:,}") == top
    assert rational(f"{top:,}".replace(",", "{,}")) == top
    assert rational(f"${top}.0$.") == top
    assert rational(f"{sign}{abs(top)}\\frac{{1}}{{{bottom}}}") == (-1 if top < 0 else 1) * (
        abs(top) + Fraction(1, bottom)
    )
    assert find_number(f"so it is \\boxed{{{top:,}}}", Reading()) == str(top)


@given(st.text(alphabet="0123456789.,-/ \\frac{}^e$%x", max_size=40))
def test_whatever_is_no_number_is_refused_without_an_error(text: str) -> None:
    value = rational(text)
    assert value is None or any(character.isdigit() for character in text)
