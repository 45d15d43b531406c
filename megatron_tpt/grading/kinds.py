"""The kinds of answers: how the reference is read, which candidate a text gives, and when the two are the same."""

import ast
import importlib.util
import re
import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, Protocol

from megatron_tpt.errors import UserError
from megatron_tpt.grading import extract
from megatron_tpt.grading.compare import Tier, same_mathematics
from megatron_tpt.grading.extract import Reading
from megatron_tpt.grading.instructions import Instructions
from megatron_tpt.grading.latex import key, normalize
from megatron_tpt.grading.numeric import is_changed, last_number, numbers_in, plain, signed, single_number

AnswerKind = Literal["exact", "number", "math", "choice", "boolean", "jee", "literal", "instructions", "code"]

LETTERS = "ABCDEFGHIJ"
_DECORATION = r"(?:\\(?:boxed|fbox|text|mathrm|textbf|mathbf)\{|[(\[{*_$'\"\s])*+"
_LETTER = re.compile(
    rf"{_DECORATION}(?:(?i:the\s+)?(?i:option|choice|letter)[\s:]*+{_DECORATION})?"
    r"(?P<letter>[A-J]|(?<=\()[a-j](?=\)))(?![A-Za-z0-9'’-])(?P<rest>.*)",
    re.S,
)
_ANOTHER_LETTER = re.compile(
    r"(?:\\(?:text|mathrm|textbf|mathbf)\{|[\s)\]}*_$,.;:\\])*+"
    r"(?:(?:or|and|nor|as well as|/|,|&|\+)(?:\\text\{|[\s({*_$}])*+[A-J]\b"
    r"|[({*_$]*+[A-J]\b(?!['’-]|\s+(?!(?:and|or)\b)[A-Za-z]{2}))"
)
_HEADING = re.compile(r"[.):]\s*[^\W\d]")
"""What follows the number of a Markdown heading."""
_YES, _NO = ("yes", "true"), ("no", "false")
_FIRST_WORD = re.compile(
    r"(?i)[^A-Za-z]*(yes|true|false|no(?=[^A-Za-z]*$|\W*[.,;:!()\n*$}—-]|\s+(?:because|since|as|it|he|she|they|there|this|"
    r"that|the|you|we|i)\b))\b"
)
_BOTH = re.compile(
    r"(?i)\b(?:yes|true|no|false)\b\W*\b(?:or|and|nor)\b"
    r"|\b(?:yes|true)\b\W+(?:no|false)\b(?!\s+\w)|\b(?:no|false)\b\W+(?:yes|true)\b(?!\s+\w)"
)
_DENIAL = re.compile(r"(?i)\b(?:not|never|no|neither|nor|cannot|hardly|nothing|none)\b|n['’]t\b")
_JEE_NOISE = re.compile(r"\\(?:text|mathrm|mathbf|textbf)|(?i:\b(?:and|options?)\b)|[\s(){}\[\],.;:$*&\\'\"]")
_MAX_OPTION = 2000
"""Longer texts, in characters, are not compared with options."""
_MAX_LITERAL = 20_000
"""Longer texts, in characters, are no literals."""
JEE_TOLERANCE = Fraction(1, 100)
"""JEEBench's own rule for decimal answers."""


class Kind(Protocol):
    """One kind of answers."""

    def reference(self, value: Any, choices: Sequence[str] = ()) -> Any | None:
        """The reference answer in a row; None when it cannot be read."""
        ...

    def candidate(self, text: str, reading: Reading, choices: Sequence[str] = ()) -> str | None:
        """The one answer that a text (without its thinking) gives; None when it gives none."""
        ...

    def same(self, reference: Any, candidate: str) -> Tier | None:
        """The tier that shows the candidate to be right; None when it is wrong."""
        ...


def make_kind(name: AnswerKind) -> Kind:
    """The kind of that name, other than "code". Raises UserError when a library that it needs is missing."""
    if name == "math" and importlib.util.find_spec("math_verify") is None:
        raise UserError("answers of the type math need math-verify: pip install math-verify")
    kinds: dict[str, type[Kind]] = {
        "exact": Exact, "number": Number, "math": Mathematics, "choice": Choice, "boolean": Boolean, "jee": Jee,
        "literal": PythonLiteral, "instructions": Instructions,
    }  # fmt: skip
    return kinds[name]()


def reference_text(name: AnswerKind, value: Any) -> str:
    """A reference in a row as a reader wants to see it: of a worked solution its answer alone."""
    if name == "code":
        return "the tests to pass"
    found = make_kind(name).reference(value) if name in ("number", "math") else None
    return str(value if found is None else found)


class Exact:
    """The same text, apart from blanks around it. A list holds alternatives."""

    def reference(self, value: Any, choices: Sequence[str] = ()) -> list[str] | None:
        texts = [_text(item).strip() for item in (value if isinstance(value, list) else [value])]
        return texts if texts and all(texts) else None

    def candidate(self, text: str, reading: Reading, choices: Sequence[str] = ()) -> str | None:
        return text.strip() or None

    def same(self, reference: list[str], candidate: str) -> Tier | None:
        return "text" if candidate in reference else None


class Number:
    """The same rational number, exactly: 1,200 = $1200.00 = 1200, 0.5 = 1/2 = \\frac{1}{2}, 50% = 50."""

    def reference(self, value: Any, choices: Sequence[str] = ()) -> Fraction | None:
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, list | bool):
            return None
        text = _text(value).rpartition("####")[2].strip()
        boxed = extract.boxes(text)
        text = boxed[-1] if boxed else text.rpartition("\n")[2]  # solutions end in a line such as "A: 24"
        # "maybe in 2024" is no reference, "Rs. 24", "x = 24" and "24 eggs" are
        has_words = re.match(r"[^=0-9]*?[A-Za-z]{3}[^=]*$", re.sub(r"\\[A-Za-z]+", "", text))
        return None if has_words else single_number(text)

    def candidate(self, text: str, reading: Reading, choices: Sequence[str] = ()) -> str | None:
        return find_number(text, reading)

    def same(self, reference: Fraction, candidate: str) -> Tier | None:
        return "number" if reference == Fraction(candidate) else None


def find_number(text: str, reading: Reading) -> str | None:
    """The number that `text` gives as its answer, as a fraction in lowest terms."""
    value = _find_number(text, reading)
    return None if value is None else str(value)


def _find_number(text: str, reading: Reading) -> Fraction | None:
    boxed, stated = extract.boxes(text), extract.statements(text)
    pick = 0 if reading.first else -1
    hashes = _number_hashes(text)
    if not reading.first and extract.has_box(text):
        return single_number(boxed[-1]) if boxed else None
    if hashes and not (reading.first and _stated_before_hashes(text)):
        return _stated_number(hashes[pick])
    if stated and numbers_in(plain(stated[pick])):
        return _stated_number(stated[pick])
    if extract.has_box(text):
        return single_number(boxed[0]) if boxed else None
    last = last_number(plain(text))
    return last[0] if last else None


def _stated_number(sentence: str) -> Fraction | None:
    """The number in what follows "answer is": 24 in "24 eggs, of which 9 are left"; none in "3 or 4"."""
    sentence = signed(sentence)
    span = extract.math_span(sentence)
    if span and is_changed(*sentence.split(span, 1)):
        return None
    first, *rest = re.split(r"[,;]\s|\(", sentence, maxsplit=1)
    several = rest and re.match(r"[\s$]*[A-Za-z]?\w?\s*=|[\s$\d.,=)-]*$", rest[0])  # x = 3, y = 4; 3, 4
    for part in (span, sentence, None if several else first):
        if part and (value := single_number(part)) is not None:
            return value
    return None


def _number_hashes(text: str) -> list[str]:
    """The rests of lines after "####" that begin with a number; "#### Step 2" and "#### 3. Results" are headings."""
    return [
        rest
        for rest in map(plain, extract.after_hashes(text))
        if (found := numbers_in(rest))
        and not re.search(r"\w", rest[: found[0][1]])
        and not _HEADING.match(rest[found[0][2] :])
    ]


def _stated_before_hashes(text: str) -> bool:
    return bool(extract.statements(text.partition("####")[0]))


class Mathematics:
    """The same mathematics; every value of a list, and no other. A list in a row holds values, all of them needed."""

    def reference(self, value: Any, choices: Sequence[str] = ()) -> str | None:
        if isinstance(value, list):
            return ", ".join(map(_text, value)) if value else None
        text = _text(value)
        boxed, hashes = extract.boxes(text), extract.after_hashes(text)
        return (boxed[-1] if boxed else hashes[-1] if hashes else text.strip()) or None

    def candidate(self, text: str, reading: Reading, choices: Sequence[str] = ()) -> str | None:
        boxed, stated = extract.boxes(text), extract.statements(text)
        hashes = [rest for rest in extract.after_hashes(text) if rest]
        if reading.first:
            if hashes and not _stated_before_hashes(text):
                return hashes[0]
            if stated:
                return _stated(stated[0])
            return boxed[0] if boxed else _last_value(text)
        if boxed or extract.has_box(text):
            return boxed[-1] if boxed else None
        if stated:
            return _stated(stated[-1])
        if hashes and re.match(r"[-$\\(]*[0-9]", hashes[-1]):
            return hashes[-1]
        return _last_value(text)

    def same(self, reference: str, candidate: str) -> Tier | None:
        return same_mathematics(reference, candidate)


def _stated(sentence: str) -> str | None:
    """The answer in what follows "answer is": its mathematics, or its number among words, or all of it."""
    sentence = signed(sentence)
    if span := extract.math_span(sentence):
        return sentence if is_changed(*sentence.split(span, 1)) else span
    numbers = numbers_in(sentence)
    if len(numbers) == 1:
        _, start, end = numbers[0]
        before, after = sentence[:start].replace("*", " "), sentence[end:].replace("*", " ")
        words = f"{before} {after}".split()
        if (
            words
            and not is_changed(before, after)
            and all(re.fullmatch(r"[A-Za-z]{2,}[,:]?|a", word) for word in words)
        ):
            return sentence[start:end].strip()
    return sentence.strip("*_ ") or None


def _last_value(text: str) -> str | None:
    last = last_number(text)
    return (extract.last_chunk(text, last[1], last[2]) or None) if last else None


class Choice:
    """One of the options A to J. References: a letter, an option's text, or its number from 0 (a JSON number)."""

    def reference(self, value: Any, choices: Sequence[str] = ()) -> str | None:
        letters = LETTERS[: len(choices)] if choices else LETTERS
        if isinstance(value, list | bool | float):
            return None
        if isinstance(value, int):
            return letters[value] if 0 <= value < len(letters) else None
        by_text = _option(str(value), choices)
        letter = str(value).strip().strip("().").upper()
        return letter if len(letter) == 1 and letter in letters else by_text

    def candidate(self, text: str, reading: Reading, choices: Sequence[str] = ()) -> str | None:
        boxed, stated = extract.boxes(text), extract.statements(text)
        if not reading.first and (boxed or extract.has_box(text)):
            return self._read(boxed[-1], choices) if boxed else None
        if stated:
            return self._read(stated[0 if reading.first else -1], choices)
        if boxed:
            return self._read(boxed[0], choices)
        start = text.strip()
        if re.match(r"[(*\s]*[A-J](?:[).:*\s]*$|[).:])", start):
            return self._read(start.partition("\n")[0], choices)
        return self._read(start, choices) if _option(start, choices) else None

    def same(self, reference: str, candidate: str) -> Tier | None:
        return "text" if reference == candidate else None

    def _read(self, text: str, choices: Sequence[str]) -> str | None:
        match = _LETTER.match(text)
        if match is None or _ANOTHER_LETTER.match(match["rest"]):
            return None if match else _option(text, choices)
        letter = match["letter"].upper()
        # "The answer is a good one", "I think": a word, unless it is bracketed or ends there.
        if letter in "AI" and not text.lstrip("*_ ").startswith(("(", "[", "\\", "$")):
            next_word = re.match(r"[*_ ]+([a-z]+)", match["rest"])
            if next_word and next_word[1] not in ("because", "since", "as", "and", "which"):
                return None
        limit = LETTERS[: len(choices)] if choices else LETTERS
        return letter if letter in limit else None


def _option(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that has this text; None where none or several have."""
    if len(text) > _MAX_OPTION:
        return None
    wanted = key(normalize(text)).casefold()
    matching = [i for i, choice in enumerate(choices) if key(normalize(choice)).casefold() == wanted]
    return LETTERS[matching[0]] if len(matching) == 1 and matching[0] < len(LETTERS) else None


class Boolean:
    """Yes or no, true or false. References: either word, or a JSON boolean."""

    def reference(self, value: Any, choices: Sequence[str] = ()) -> str | None:
        return _truth(_text(value)) if not isinstance(value, list) else None

    def candidate(self, text: str, reading: Reading, choices: Sequence[str] = ()) -> str | None:
        boxed, stated = extract.boxes(text), extract.statements(text)
        if not reading.first and (boxed or extract.has_box(text)):
            return _truth(boxed[-1]) if boxed else None
        if stated:
            return _first_truth(stated[0 if reading.first else -1])
        if boxed:
            return _truth(boxed[0])
        return _first_truth(text.strip().partition("\n")[0]) or (None if reading.first else _last_truth(text))

    def same(self, reference: str, candidate: str) -> Tier | None:
        return "text" if reference == candidate else None


def _truth(text: str) -> str | None:
    word = key(normalize(text)).casefold()
    return "true" if word in _YES else "false" if word in _NO else None


def _first_truth(text: str) -> str | None:
    """What the first word says; nothing in "no doubt", "yes or no", "yes, no"."""
    text = re.sub(r"\\(?:text|boxed|mathrm|textbf)\b", " ", text)
    if _BOTH.search(text) or not (match := _FIRST_WORD.match(text)):
        return None
    return _truth(match[1])


def _last_truth(text: str) -> str | None:
    """What the last word says, unless something in its clause may deny it: "it is not true", "no doubt ... true"."""
    clause = re.split(r"[.,;:!?\n]\s", text.strip().rstrip(".!*_ "))[-1]
    words = re.findall(r"[A-Za-z]+", clause)
    return _truth(words[-1]) if words and not _DENIAL.search(clause[: clause.rindex(words[-1])]) else None


class Jee:
    """JEEBench: the same letters (all of them), the same integer, or a decimal within 0.01."""

    def reference(self, value: Any, choices: Sequence[str] = ()) -> str | tuple[Fraction, Fraction] | None:
        """The letters, or the number and how much an answer may differ from it: 6.00 is a decimal, 6 an integer."""
        text = "".join(map(_text, value)) if isinstance(value, list) else _text(value)
        if letters := _letters(text):
            return letters
        number = None if isinstance(value, bool) else single_number(text)
        if number is None:
            return None
        is_decimal = re.search(r"\.[0-9]", text) or number.denominator != 1
        return number, JEE_TOLERANCE if is_decimal else Fraction(0)

    def candidate(self, text: str, reading: Reading, choices: Sequence[str] = ()) -> str | None:
        boxed, stated = extract.boxes(text), extract.statements(text)
        pick = 0 if reading.first else -1
        if boxed or extract.has_box(text):
            return self._read(boxed[pick]) if boxed else None
        if stated:
            span = extract.math_span(stated[pick])
            return self._read(stated[pick]) or (self._read(span) if span else None)
        return self._read(text) or find_number(text, reading)

    def same(self, reference: str | tuple[Fraction, Fraction], candidate: str) -> Tier | None:
        if isinstance(reference, str):
            return "text" if reference == candidate else None
        if not re.fullmatch(r"-?[0-9]+(?:/[0-9]+)?", candidate):
            return None
        number, tolerance = reference
        return "number" if abs(Fraction(candidate) - number) <= tolerance else None

    def _read(self, text: str) -> str | None:
        letters = _letters(text)
        value = None if letters else single_number(text)
        return letters or (None if value is None else str(value))


class PythonLiteral:
    """The same value of Python, as the whole output has it: [1,2] = [1, 2], "a" = 'a', 1.0 = 1 (CRUXEval)."""

    def reference(self, value: Any, choices: Sequence[str] = ()) -> Any | None:
        return None if _value(str(value)) is None else str(value)

    def candidate(self, text: str, reading: Reading, choices: Sequence[str] = ()) -> str | None:
        return text.strip() or None

    def same(self, reference: str, candidate: str) -> Tier | None:
        if reference.strip() == candidate:
            return "text"
        return "value" if _value(candidate) == _value(reference) else None


def _value(text: str) -> tuple[Any] | None:
    """The value of a literal; None for a text that is none, or too long or deep for one."""
    if len(text) > _MAX_LITERAL:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in what models write
        try:
            return (ast.literal_eval(text.strip()),)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None


def _letters(text: str) -> str | None:
    """The letters A to D that a short text lists, sorted; None when there is anything else in it."""
    if len(text) > 200:
        return None
    letters = _JEE_NOISE.sub("", text)
    return "".join(sorted(set(letters))) if re.fullmatch("[A-D]{1,4}", letters) else None


def _text(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)
