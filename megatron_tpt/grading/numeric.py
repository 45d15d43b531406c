"""Numbers, exactly: as running text has them, and as a whole answer in plain text or LaTeX."""

import re
from fractions import Fraction

from megatron_tpt.grading.latex import MULTIPLIERS, is_unit, normalize, split_unit

_MAX_BITS = 10_000
"""Larger powers are no answer that anyone compares by value, and Python refuses to turn 4,300 digits into text."""
_MAX_LENGTH = 2000
"""Longer texts, in characters, are no number."""

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+(?![0-9A-Za-z]))?"
_MULTIPLIER = rf"(?:\s+|\s*\\text\{{\s*)(?P<multiplier>(?i:{'|'.join(MULTIPLIERS)}))\b\}}?"
_NUMBER = re.compile(
    # No number starts inside a name (v7) or a number; a minus after something is a subtraction (9-5).
    r"(?<![A-Za-z0-9_])"
    r"(?P<sign>(?<![\w)\]}%.])[-\u2212\u2013](?=[$€£.0-9]))?[$€£]?(?P<inner_sign>(?<=[$€£])[-\u2212\u2013])?\s?"
    rf"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+/[0-9]))?(?P<value>{_DECIMAL})"
    r"(?:\s?/\s?(?P<divisor>[0-9]+(?:\.[0-9]+)?))?"
    rf"(?:{_MULTIPLIER})?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}|([0-9]))\s*(?:\{([^{}]+)\}|([0-9]))")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,\\!\s*|\{,\}|\\[,;:! ]\s*)(?=[0-9]{3}(?![0-9]))")

_FRACTIONS = str.maketrans({"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3"})

_PLAIN = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_SIMPLE = re.compile(
    rf"(?P<sign>[+-]*)(?:(?P<whole>[0-9]+)(?=\\frac))?(?:(?P<value>{_PLAIN})(?:[eE](?P<exp>[+-]?[0-9]{{1,3}}))?"
    rf"(?:/(?P<divisor>{_PLAIN}))?|\\frac\{{(?P<top>[+-]?{_PLAIN})\}}\{{(?P<bottom>[+-]?{_PLAIN})\}})"
)
_POWER = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<factor>{_PLAIN})(?:\\times|\\cdot|\*))?(?P<base>[0-9]+)\^\{{?(?P<exp>[+-]?[0-9]{{1,5}})\}}?"
)

_NEGATIVE = re.compile(
    r"(?i)(?:\bnegative|(?P<before>^|\b(?:is|was|be|equals?)\b|[=:])(?P<space>[\s*]*)minus)\s+(?P<open>\$?)"
    r"(?=\\?[$€£]?\.?[0-9])"
)
_CHANGED_BEFORE = re.compile(
    r"(?i)\b(?:not|never|cannot)\b|n['’]t\b|\b(?:minus|plus|half|half of|twice|double|triple|(?:square|cube) root of|"
    r"(?:more|less|fewer|greater|larger|smaller|higher|lower) than|at least|at most)[\s$*\\]*$"
)
_CHANGED_AFTER = re.compile(
    r"(?i)^\W*(?:or|and)\s+(?:more|less|fewer|greater|above|below|up|a (?:half|third|quarter))\b"
    r"|^\W*(?:squared|cubed|factorial|minus|plus|halves|thirds|hundredths|tenths|thousandths)\b"
)
_DENIED_BEFORE = re.compile(
    r"(?i)(?:\b(?:not|never|cannot)|n['’]t)\s+(?:(?:be|equal|to|exactly|the|number|value|answer)\s+){0,3}[-−$*\\(]*$"
)
_RELATION = re.compile(r"!=|[<>≠≤≥]|\\(?:ne|neq|le|leq|ge|geq|lt|gt)(?![A-Za-z])")
_SEVERAL = re.compile(r"[=0-9].*(?:,\s|;|\b(?:or|and)\b)", re.S)


def numbers_in(text: str) -> list[tuple[Fraction, int, int]]:
    """The numbers in running text, each with where it begins and ends in `plain(text)`."""
    return [
        (value, match.start(), match.end()) for match in _NUMBER.finditer(text) if (value := _value(match)) is not None
    ]


def last_number(text: str) -> tuple[Fraction, int, int] | None:
    """The last of `numbers_in(text)`; None where it is denied, as in "so it is not 5"."""
    for match in reversed(list(_NUMBER.finditer(text))):
        if (value := _value(match)) is not None:
            start = match.start()
            is_denied = _DENIED_BEFORE.search(text[max(start - 100, 0) : start])
            return None if is_denied else (value, start, match.end())
    return None


def plain(text: str) -> str:
    """The text with LaTeX's fractions as a/b, negative 5 as -5, and no separators of thousands but the comma."""
    return signed(_LATEX_FRACTION.sub(_plain_fraction, _THOUSANDS.sub("", text)).translate(_FRACTIONS))


def signed(text: str) -> str:
    """The text with "negative 5" as "-5"."""
    return _NEGATIVE.sub(lambda match: f"{match['before'] or ''}{match['space'] or ''}{match['open']}-", text)


def is_changed(before: str, after: str) -> bool:
    """Whether the words around a number make it another, or none: "not 5", "half of 5", "5 or more", "5 squared"."""
    return bool(_CHANGED_BEFORE.search(before) or _CHANGED_AFTER.search(after))


def rational(answer: str) -> Fraction | None:
    """The value of an answer that is one rational number and nothing else: 1,200; -3/4; 1\\frac{1}{2}; 2e-3; 10^{3}."""
    if len(answer) > _MAX_LENGTH:
        return None
    text, factor = normalize(answer), 1
    if match := re.search(_MULTIPLIER + "$", text):
        text, factor = text[: match.start()], MULTIPLIERS[match["multiplier"].lower()]
    if re.search(r"[0-9.]\s+[0-9.]", text):  # 1 2 is not 12
        return None
    text = re.sub(r"\s+", "", text)
    if len(text) > 1000:
        return None
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    if match := _SIMPLE.fullmatch(text):
        value = _simple(match)
    else:
        match = _POWER.fullmatch(text)
        value = _power(match) if match else None
    return None if value is None else value * factor


def single_number(text: str) -> Fraction | None:
    """The number that a short text gives, words and units aside: "24 eggs", "x = 5"; None for "3 or 4", 3\\sqrt{2}."""
    if len(text) > _MAX_LENGTH or _RELATION.search(text):
        return None
    left, _, text = text.rpartition("=")  # of 9 * 2 = 18, but not of x = 3, y = 4
    if _SEVERAL.search(left):
        return None
    value = rational(split_unit(normalize(text))[0])
    if value is not None:
        return value
    text = plain(text)
    numbers = numbers_in(text)
    if len(numbers) != 1:
        return None
    value, start, end = numbers[0]
    before, after = text[:start], text[end:]
    if is_changed(before, after) or _is_operand(after):
        return None
    around = re.sub(r"\\(?:text|mbox|textbf|mathrm|mathbf)\b|\\[%$,;:! ]", " ", f"{before} {after}")
    return None if re.search(r"[\\^_+*/√±]|(?:^|\s)[-−–](?:\s|$)|[-−–]\s*\(", around.replace("**", " ")) else value


def _is_operand(after: str) -> bool:
    """Whether something at the number makes it part of a formula: 5!, 2x."""
    letters = re.match(r"(?!(?:st|nd|rd|th)\b)[A-Za-z]+", after)
    return after.startswith("!") or bool(letters and not is_unit(letters[0]) and letters[0] not in "mglLshW")


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
    value = (value + int(match["whole"] or 0)) * MULTIPLIERS.get((match["multiplier"] or "").lower(), 1)
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
