"""Numbers, exactly: as running text has them, and as a whole answer in plain text or LaTeX."""

import re
from fractions import Fraction

from megatron_tpt.grading.latex import normalize, split_unit

_MAX_BITS = 10_000
"""Larger powers are no answer that anyone compares by value, and Python refuses to turn 4,300 digits into text."""
_MAX_LENGTH = 2000
"""Longer texts, in characters, are no number."""

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+(?![0-9A-Za-z]))?"
_NUMBER = re.compile(
    # No number starts inside a name (v7) or a number; a minus after something is a subtraction (9-5).
    r"(?<![A-Za-z0-9_])"
    r"(?P<sign>(?<![\w)\]}%.])[-\u2212\u2013](?=[$€£.0-9]))?[$€£]?(?P<inner_sign>(?<=[$€£])[-\u2212\u2013])?\s?"
    rf"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+/[0-9]))?(?P<value>{_DECIMAL})"
    r"(?:\s?/\s?(?P<divisor>[0-9]+(?:\.[0-9]+)?))?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}|([0-9]))\s*(?:\{([^{}]+)\}|([0-9]))")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,\\!\s*|\{,\}|\\[,;:! ]\s*)(?=[0-9]{3}(?![0-9]))")

_PLAIN = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_SIMPLE = re.compile(
    rf"(?P<sign>[+-]*)(?:(?P<whole>[0-9]+)(?=\\frac))?(?:(?P<value>{_PLAIN})(?:[eE](?P<exp>[+-]?[0-9]{{1,3}}))?"
    rf"(?:/(?P<divisor>{_PLAIN}))?|\\frac\{{(?P<top>[+-]?{_PLAIN})\}}\{{(?P<bottom>[+-]?{_PLAIN})\}})"
)
_POWER = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<factor>{_PLAIN})(?:\\times|\\cdot|\*))?(?P<base>[0-9]+)\^\{{?(?P<exp>[+-]?[0-9]{{1,5}})\}}?"
)


def numbers_in(text: str) -> list[tuple[Fraction, int, int]]:
    """The numbers in running text, each with where it begins and ends in `plain(text)`."""
    return [
        (value, match.start(), match.end()) for match in _NUMBER.finditer(text) if (value := _value(match)) is not None
    ]


def last_number(text: str) -> tuple[Fraction, int, int] | None:
    """The last of `numbers_in(text)`."""
    for match in reversed(list(_NUMBER.finditer(text))):
        if (value := _value(match)) is not None:
            return value, match.start(), match.end()
    return None


def plain(text: str) -> str:
    """The text with LaTeX's fractions as a/b and without separators of thousands other than the comma."""
    return _LATEX_FRACTION.sub(_plain_fraction, _THOUSANDS.sub("", text))


def rational(answer: str) -> Fraction | None:
    """The value of an answer that is one rational number and nothing else: 1,200; -3/4; 1\\frac{1}{2}; 2e-3; 10^{3}."""
    if len(answer) > _MAX_LENGTH:
        return None
    text = re.sub(r"\s+", "", normalize(answer))
    if len(text) > 1000:
        return None
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    if match := _SIMPLE.fullmatch(text):
        return _simple(match)
    if match := _POWER.fullmatch(text):
        return _power(match)
    return None


def single_number(text: str) -> Fraction | None:
    """The number that a short text gives, words and units aside: "24 eggs", "x = 5"; None for "3 or 4", 3\\sqrt{2}."""
    if len(text) > _MAX_LENGTH:
        return None
    text = text.rpartition("=")[2]
    value = rational(split_unit(normalize(text))[0])
    if value is not None:
        return value
    text = plain(text)
    numbers = numbers_in(text)
    if len(numbers) != 1:
        return None
    value, start, end = numbers[0]
    around = re.sub(r"\\(?:text|mbox|textbf|mathrm|mathbf)\b|\\[%$,;:! ]", " ", text[:start] + " " + text[end:])
    return None if re.search(r"[\\^_+*/<>√±]|(?:^|\s)[-−–](?:\s|$)", around.replace("**", " ")) else value


def _value(match: re.Match[str]) -> Fraction | None:
    number = match["value"].replace(",", "")
    exponent = number.lower().partition("e")[2]
    if len(match[0]) > 1000 or len(exponent) > 3:  # no answer, and Python refuses to turn it into text
        return None
    value = Fraction(number)
    if match["divisor"]:
        divisor = Fraction(match["divisor"])
        if divisor == 0:
            return None
        value /= divisor
    value += int(match["whole"] or 0)
    return -value if match["sign"] or match["inner_sign"] else value


def _plain_fraction(match: re.Match[str]) -> str:
    follows_digit = match.start() > 0 and match.string[match.start() - 1].isdigit()
    top, bottom = match[1] or match[2], match[3] or match[4]
    return f"{' ' if follows_digit else ''}{top.strip()}/{bottom.strip()}"


def _simple(match: re.Match[str]) -> Fraction | None:
    if match["value"]:
        value = Fraction(match["value"]) * Fraction(10) ** int(match["exp"] or 0)
        divisor = Fraction(match["divisor"] or 1)
    else:
        value, divisor = Fraction(match["top"]), Fraction(match["bottom"])
    if divisor == 0:
        return None
    value = value / divisor + int(match["whole"] or 0)
    return -value if match["sign"].count("-") % 2 else value


def _power(match: re.Match[str]) -> Fraction | None:
    base, exponent = int(match["base"]), int(match["exp"])
    if base.bit_length() * abs(exponent) > _MAX_BITS or (base == 0 and exponent < 0):
        return None
    value = Fraction(match["factor"] or 1) * Fraction(base) ** exponent
    return -value if match["sign"] == "-" else value
