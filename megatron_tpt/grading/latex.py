"""Mathematical answers as text: one spelling for the many of LaTeX and Unicode, units, and the parts of a list."""

import re
from dataclasses import dataclass

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ",
        "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "√": r"\sqrt ", "∪": r"\cup ", "∩": r"\cap ",
        "∈": r"\in ", "±": r"\pm ", "°": r"^\circ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "\u00a0": " ", "\u2009": " ",
        "\u202f": " ", "€": r"\text{€}", "£": r"\text{£}",
    }
)  # fmt: skip
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_SIZES = re.compile(r"\\(?:left|right|big|Big|bigg|Bigg)[lrm]?(?![A-Za-z])|\\(?:displaystyle|limits)(?![A-Za-z])")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\s*,\s*\\!\s*|\{,\}|\\[,;:! ]\s*|~)(?=[0-9]{3}(?![0-9]))")
_GROUPS = re.compile(r"[-+]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?")
_COMMAS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_SPACES = re.compile(r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])|\\hspace\{[^{}]*\}")
_TEXT = r"\\(?:text|mbox|textrm|textnormal|textbf|textit|mathrm|mathbf|mathit|operatorname|hbox)"
_RENAMED = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\leq(?:slant)?(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\geq(?:slant)?(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z])|\{\s*\\degree\s*\})|\\degree(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"([0-9])\s+([0-9]+)\s*/\s*([0-9]+)"), r"\1\\frac{\2}{\3}"),
)
MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
"""Not dozen: problems that end in "7 dozen" ask how many dozens, as those of GSM8K do."""
_MULTIPLIED = re.compile(rf"({'|'.join(MULTIPLIERS)}) (.+)")
_UNIT_NAMES = {
    "degree": "^\\circ", "degrees": "^\\circ", "dollar": "\\$", "dollars": "\\$", "percent": "\\%", "%": "\\%",
    "\\%": "\\%", "^\\circ": "^\\circ", "units": "", "unit": "",
}  # fmt: skip
_UNIT = re.compile(rf"(?P<unit>\\?%|\^\\circ|(?:(?:{_TEXT}\{{[^{{}}]*\}}\s*)+(?:\^\{{?[0-9]\}}?)?))\s*$")
_WORD_UNIT = re.compile(
    r"(?P<value>[-+]?[0-9][0-9,./ ]*?)\s*(?P<unit>[A-Za-z]{2,20}(?:[ /][A-Za-z]{1,20}){0,3}(?:\^\{?[0-9]\}?)?)"
)
_KNOWN_UNIT = re.compile(
    "m|cm|mm|km|nm|ft|in|inch|mi|yd|g|kg|mg|lb|lbs|oz|l|ml|s|sec|min|h|hr|hrs|ms|ns|a.m|p.m|am|pm|mph|kph|j|kj|cal|kcal|"
    "w|kw|v|hz|khz|mhz|ghz|n|pa|kpa|atm|k|c|f|b|kb|mb|gb|tb|mol|rad|per|sq|cu|men|usd|eur|€|£"
)
_NO_UNIT = re.compile(
    "more|less|fewer|least|most|when|where|while|except|unless|otherwise|than|then|else|with|squared|cubed|root|times|"
    "plus|minus|over|under|above|below|factorial|modulo|base|half|halves|thirds?|quarters?|tenths|hundredths|"
    "score|hundreds?|thousands?|[mbtr]+illions?|only|approximately|about|roughly|both|either|alpha|beta|gamma|delta|"
    "epsilon|zeta|theta|kappa|lambda|sigma|omega|sqrt|sinh|cosh|tanh|coth|arcsin|arccos|arctan|infinity|even|undefined|"
    "true|false|none"
)
_BASE = re.compile(r"(?P<value>(?=[A-F]*[0-9])[0-9A-F]+)\s*_\s*\{?\s*(?P<base>[0-9]{1,2})\s*\}?")
_PREFIX = re.compile(r"\s*[A-Za-z]'*(?:_(?:\w|\{\w+\}))?(?:\([a-z]\))?\s*(?:=|\\in(?![a-z]))\s*")
_SEPARATOR = re.compile(rf",|;|{_TEXT}\{{\s*,?\s*(?:and|or)\s*\}}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_MATRIX = re.compile(r"\\begin\{([pb]?matrix)\}(.*)\\end\{\1\}", re.S)


def normalize(text: str) -> str:
    """One spelling for what LaTeX, Unicode and Markdown write in many ways. The meaning is kept; spaces remain."""
    text = _strip(text.translate(_CHARACTERS))
    text = re.sub(r"(?<!\\)\$", "", text)
    text = _SIZES.sub("", text)
    text = _THOUSANDS.sub("", text)
    if not any(bracket in text for bracket in "([{") or re.match(r"\\text|\\boxed|\\\$|\$", text):
        text = _COMMAS.sub(lambda match: match[0].replace(",", ""), text)
    text = _SPACES.sub(" ", text)
    if _GROUPS.fullmatch(text):
        text = text.replace(" ", "")
    for pattern, replacement in _RENAMED:
        text = pattern.sub(replacement, text)
    return _strip(_braced(_braced(text, "\\sqrt", 1), "\\frac", 2))


def key(text: str) -> str:
    """What equal texts have in common: no \\text{}, and no spaces but those between digits."""
    text = re.sub(rf"{_TEXT}\s*\{{([^{{}}]*)\}}", r"\1", text)
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9\s])", "", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    if match := re.fullmatch(r"\(([A-Za-z])\)", text):  # (C): a choice
        text = match[1]
    return text


def same_text(a: str, b: str) -> bool:
    """Whether the keys agree; of words (in \\text{} on one side, or evelyn and Evelyn), without regard to case."""
    keys = key(a), key(b)
    if keys[0] == keys[1]:
        return True
    if not all(re.fullmatch(r"[A-Za-z-]{3,}", each) for each in keys):
        return False
    words = any(re.fullmatch(rf"{_TEXT}\s*\{{[^{{}}]*\}}", each.strip()) for each in (a, b))
    words = words or all(re.fullmatch(r"[A-Za-z][a-z]+", each) for each in keys)
    return words and keys[0].casefold() == keys[1].casefold()


def split_unit(text: str) -> tuple[str, str]:
    """A normalized answer without its unit, and the unit ("" for none): 15\\text{ cm}^2, \\$18.90, 30^\\circ, 12 in; of
    3 million dollars, 3 million and dollars. Letters right behind a number are only a unit if they are a known one.

    The base of a numeral (2516_8) is treated as one: it may be missing, and must not differ.
    """
    if match := re.fullmatch(r"([-+]?)\\\$(.+)", text):
        return match[1] + match[2].strip(), "\\$"
    if match := _BASE.fullmatch(text):
        return match["value"], f"_{match['base']}"
    match = _UNIT.search(text)
    if match and re.search(r"[0-9]", text[: match.start()]):
        value = text[: match.start()]
    elif match := _WORD_UNIT.fullmatch(text):
        value = match["value"]
        if match.start("unit") == match.end("value") and not _is_known(re.split("[ /^]", match["unit"].lower())[0]):
            return text, ""  # 3abcd is a product
    if match is None:
        return text, ""
    unit = _words(match["unit"])
    if multiplied := _MULTIPLIED.fullmatch(unit):
        value, unit = f"{value.strip()} {multiplied[1]}", multiplied[2]
    return (value.strip(), _UNIT_NAMES.get(unit, unit)) if is_unit(unit) else (text, "")


def is_unit(words: str) -> bool:
    """Whether words after a number name what it counts: known units, or nouns; not "million" or "if n is even"."""
    found = re.split(r"[ /]+", re.sub(r"\^[0-9]$", "", words.lower()))
    return words in _UNIT_NAMES or (len(found) <= 4 and all(map(_is_unit_word, found)))


def _is_unit_word(word: str) -> bool:
    noun = re.fullmatch("[a-z]{4,}", word) and not _NO_UNIT.fullmatch(word)
    return bool(noun) or _is_known(word)


def _is_known(word: str) -> bool:
    return word in _UNIT_NAMES or _KNOWN_UNIT.fullmatch(word) is not None


def without_prefix(text: str) -> str:
    """The right side of "x = ...", "f(x) = ..." or "x \\in ..."."""
    match = _PREFIX.match(text)
    return text[match.end() :] if match and "=" not in text[match.end() :] else text


@dataclass(frozen=True)
class Parts:
    """An answer that is made of others."""

    kind: str
    """"list" (unordered), "union" (unordered), a pair of brackets such as "(]" (ordered), or "matrix RxC"."""
    items: list[str]


def parts(text: str) -> Parts | None:
    """The elements of a list, set, tuple, interval, union or matrix; None for a single value."""
    text = text.strip()
    if (match := _MATRIX.fullmatch(text)) and "\\begin" not in match[2]:
        rows = [row.split("&") for row in match[2].strip().removesuffix("\\\\").split("\\\\")]
        return Parts(f"matrix {len(rows)}x{len(rows[0])}", [cell for row in rows for cell in row])
    if text[:2] == "\\{" and text[-2:] == "\\}" and _wraps(text):
        inner = parts(text[2:-2])
        return Parts("list", inner.items if inner and inner.kind == "list" else [text[2:-2]])
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _wraps(text):
        items = _split(text[1:-1], re.compile(","))
        return Parts(text[0] + text[-1], items) if len(items) > 1 else None
    items = _split(text, re.compile(r"\\cup(?![a-z])"))
    if len(items) > 1:
        return Parts("union", items)
    items = [both for item in _split(text, _SEPARATOR) for both in _plus_minus(re.sub(r"^\s*either\b", "", item))]
    return Parts("list", [item for item in items if item.strip()]) if len(items) > 1 else None


def letters(text: str) -> set[str]:
    """The letters outside of commands and of words in \\text{}."""
    return set(re.findall(r"[A-Za-z]", re.sub(rf"{_TEXT}\s*\{{[^{{}}]*\}}|\\[A-Za-z]+", "", text)))


def texts(text: str) -> list[str]:
    """The words in \\text{} and the like, sorted."""
    found = (key(words) for words in re.findall(r"\\(?:text|mbox|textrm|textnormal|hbox)\s*\{([^{}]*)\}", text))
    return sorted(words.casefold() if len(words) > 2 else words for words in found)


def balanced(text: str) -> bool:
    """Whether every brace is closed."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text, re.S):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth < 0:
            return False
    return depth == 0


def _strip(text: str) -> str:
    while True:
        before = text
        text = text.strip()
        for start, end in _WRAPPERS:
            if len(text) > len(start + end) and text.startswith(start) and text.endswith(end):
                inner = text[len(start) : -len(end)]
                text = inner if start not in inner and end not in inner else text
        if text.endswith((".", ",", ";", "\\\\")) and not text.endswith("..."):
            text = text.removesuffix("\\\\").rstrip(".,;") if not text.endswith("\\,") else text[:-2]
        if text == before:
            return text


def _braced(text: str, command: str, count: int) -> str:
    """The text with braces around the arguments of `command`, the innermost first: \\frac12 is \\frac{1}{2}."""
    end = len(text)
    while (i := text.rfind(command, 0, end)) >= 0:
        end, place = i, i + len(command)
        if text[place : place + 1].isalpha():
            continue
        arguments = ""
        if command == "\\sqrt" and text[place : place + 1] == "[" and "]" in text[place:]:
            close = text.index("]", place) + 1
            arguments, place = text[place:close], close
        for _ in range(count):
            argument, place = _argument(text, place)
            if argument is None:
                break
            arguments += "{" + argument + "}"
        else:
            text = text[:i] + command + arguments + text[place:]
    return text


def _argument(text: str, place: int) -> tuple[str | None, int]:
    """The argument that begins at `place`, without its braces, and where it ends."""
    match = re.compile(r"\s*(\\[A-Za-z]+|[0-9A-Za-z]|\{)").match(text, place)
    if match is None:
        return None, place
    if match[1] != "{":
        return match[1], match.end()
    depth = 1
    for token in re.compile(r"\\.|[{}]", re.S).finditer(text, match.end()):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[match.end() : token.start()].strip(), token.end()
    return None, place


def _words(unit: str) -> str:
    return re.sub(r"\s+", " ", re.sub(rf"{_TEXT}|[{{}}]", "", unit)).strip(" .").lower()


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """`text` at every separator that is in no bracket."""
    items, depth, start = [], 0, 0
    token = re.compile(rf"(?P<separator>{separator.pattern})|\\[{{}}]|\\[A-Za-z]+|[()\[\]{{}}]")
    for match in token.finditer(text):
        if match["separator"] and depth == 0:
            items.append(text[start : match.start()])
            start = match.end()
        elif not match["separator"]:
            depth += _BRACKETS.get(match[0].lstrip("\\"), 0)
    return [*items, text[start:]]


def _plus_minus(item: str) -> list[str]:
    if len(re.findall(r"\\pm(?![a-z])", item)) != 1:
        return [item]
    return [re.sub(r"\\pm(?![a-z])", sign, item) for sign in ("+", "-")]


def _wraps(text: str) -> bool:
    """Whether the first bracket is closed by the last."""
    text, depth = text.replace("\\", ""), 0
    for i, character in enumerate(text):
        depth += _BRACKETS.get(character, 0)
        if depth == 0:
            return i == len(text) - 1
    return False
