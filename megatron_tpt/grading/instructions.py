"""Instructions whose following a program can check: the 25 kinds of IFEval (arXiv 2311.07911).

The rules are those of google-research's `instruction_following_eval`, "strict": an output follows a prompt when it
follows all instructions in it, as it stands. Two need models there that would have to be downloaded, and are of other
origin here: sentences end by NLTK's Punkt without its list of abbreviations, and languages are told by py3langid.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_tpt.grading.compare import Tier
from megatron_tpt.grading.extract import Reading

Check = Callable[..., bool]
Instruction = tuple[str, dict[str, Any]]
"""Its name, such as "punctuation:no_comma", and its arguments."""

_FEWER, _AT_LEAST = "less than", "at least"
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_MARKS = (".", ",", "?", "!", "'", '"')


class Instructions:
    """All instructions of a row of IFEval: an object with `instruction_id_list` and `kwargs`."""

    def reference(self, value: Any, choices: Sequence[str] = ()) -> list[Instruction] | None:
        """The instructions; None where one cannot be read."""
        if not isinstance(value, Mapping):
            return None
        names, given = value.get("instruction_id_list"), value.get("kwargs")
        if not isinstance(names, list) or not isinstance(given, list) or not names or len(names) != len(given):
            return None
        found = [read for name, each in zip(names, given, strict=True) if (read := _instruction(name, each))]
        return found if len(found) == len(names) else None

    def candidate(self, text: str, reading: Reading, choices: Sequence[str] = ()) -> str | None:
        """The whole text."""
        return text if text.strip() else None

    def same(self, reference: list[Instruction], candidate: str) -> Tier | None:
        """The tier where all are followed."""
        return None if self.missed(reference, candidate) else "instructions"

    def missed(self, reference: list[Instruction], candidate: str) -> list[str]:
        """The names of those that are not followed."""
        return [name for name, given in reference if not _CHECKS[name](candidate, **given)]


def _instruction(name: Any, given: Any) -> Instruction | None:
    """One with its own arguments; None where it is unknown, or one of them is missing or of a wrong type."""
    if not isinstance(name, str) or name not in _CHECKS or not isinstance(given, Mapping | None):
        return None
    # Tables have a column for every argument of any instruction.
    arguments = {key: _argument(key, kind, (given or {}).get(key)) for key, kind in _NEEDED[name].items()}
    return None if None in arguments.values() else (name, arguments)


def _argument(name: str, kind: Any, value: Any) -> Any | None:
    """An argument of the type `kind`; None for another."""
    if name.endswith("relation"):
        return value if value in (_FEWER, _AT_LEAST) else None
    if kind == list[str]:
        return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None
    if isinstance(value, float) and value.is_integer():  # tables with gaps have 3.0 for 3
        value = int(value)
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _related(count: int, number: int, relation: str) -> bool:
    return count < number if relation == _FEWER else count >= number


def _has_keywords(text: str, keywords: list[str]) -> bool:
    return all(re.search(word, text, re.I) for word in keywords)


def _has_keyword_so_often(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _related(len(re.findall(keyword.strip(), text, re.I)), frequency, relation)


def _lacks_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.I) for word in forbidden_words)


def _has_letter_so_often(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _related(text.lower().count(letter.strip().lower()), let_frequency, let_relation)


def _is_in_language(text: str, language: str) -> bool:
    return _language(text) == language


def _has_sentences(text: str, num_sentences: int, relation: str) -> bool:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return _related(len(PunktSentenceTokenizer().tokenize(text)), num_sentences, relation)


def _has_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs with *** between them, of which none but the first and the last is empty."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == num_paragraphs


def _has_words(text: str, num_words: int, relation: str) -> bool:
    return _related(len(re.findall(r"\w+", text)), num_words, relation)


def _begins_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """So many paragraphs with an empty line between them, and a word at the beginning of one of them."""
    parts = text.split("\n\n")
    number = sum(bool(part.strip()) for part in parts)
    if nth_paragraph > number or not (paragraph := parts[nth_paragraph - 1].strip()):
        return False
    word = paragraph.split()[0].lstrip("'").lstrip('"').lower()
    end = min((i for i in map(word.find, _MARKS) if i >= 0), default=len(word))
    return number == num_paragraphs and word[:end] == first_word.lower()


def _has_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _has_postscript(text: str, postscript_marker: str) -> bool:
    patterns = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    marker = postscript_marker.strip()
    pattern = patterns.get(marker, rf"\s*{marker.lower()}.*$")
    return re.search(pattern, text.lower(), re.M) is not None


def _has_bullets(text: str, num_bullets: int) -> bool:
    stars, dashes = (re.findall(mark, text, re.M) for mark in (r"^\s*\*[^\*].*$", r"^\s*-.*$"))
    return len(stars) + len(dashes) == num_bullets


def _has_highlights(text: str, num_highlights: int) -> bool:
    single = [part for part in re.findall(r"\*[^\n\*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n\*]*\*\*", text) if part[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def _has_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) - 1 >= num_sections


def _is_json(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _has_title(text: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _gives_two(text: str) -> bool:
    """Two different answers, with six stars between them."""
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    answers = [part.strip() for part in parts if part.strip()]
    return len(answers) == 2 and answers[0] != answers[1]


def _repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _is_quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _has_capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    from nltk.tokenize import NLTKWordTokenizer

    words = NLTKWordTokenizer().tokenize(text)
    return _related(sum(word.isupper() for word in words), capital_frequency, capital_relation)


def _is_capital_english(text: str) -> bool:
    return text.isupper() and _language(text.lower()) == "en"


def _is_lowercase_english(text: str) -> bool:
    return text.islower() and _language(text) == "en"


def _language(text: str) -> str:
    return str(_identifier().classify(text)[0])


@functools.cache
def _identifier() -> Any:
    """langid.py's model (Lui and Baldwin 2012), which comes with the package."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


_CHECKS: Mapping[str, Check] = {
    "keywords:existence": _has_keywords,
    "keywords:frequency": _has_keyword_so_often,
    "keywords:forbidden_words": _lacks_words,
    "keywords:letter_frequency": _has_letter_so_often,
    "language:response_language": _is_in_language,
    "length_constraints:number_sentences": _has_sentences,
    "length_constraints:number_paragraphs": _has_paragraphs,
    "length_constraints:number_words": _has_words,
    "length_constraints:nth_paragraph_first_word": _begins_paragraph,
    "detectable_content:number_placeholders": _has_placeholders,
    "detectable_content:postscript": _has_postscript,
    "detectable_format:number_bullet_lists": _has_bullets,
    "detectable_format:constrained_response": lambda text: any(answer in text for answer in _CONSTRAINED),
    "detectable_format:number_highlighted_sections": _has_highlights,
    "detectable_format:multiple_sections": _has_sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _has_title,
    "combination:two_responses": _gives_two,
    "combination:repeat_prompt": _repeats_prompt,
    "startend:end_checker": _ends_with,
    "startend:quotation": _is_quoted,
    "change_case:capital_word_frequency": _has_capital_words,
    "change_case:english_capital": _is_capital_english,
    "change_case:english_lowercase": _is_lowercase_english,
    "punctuation:no_comma": lambda text: "," not in text,
}
_NEEDED: Mapping[str, Mapping[str, Any]] = {
    name: {key: each.annotation for key, each in [*inspect.signature(check).parameters.items()][1:]}
    for name, check in _CHECKS.items()
}
"""The arguments of every instruction, with their types."""
