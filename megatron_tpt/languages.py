"""The language of a text, by py3langid: langid.py's naive Bayes over byte n-grams (Lui and Baldwin 2012)."""

from functools import cache
from typing import Any

_MIN_PROBABILITY = 0.9
"""Of GSM8K's 8,792 answers, half formulas, none is classified as another language than English above this score."""
_NOT_A_LANGUAGE = "zxx"


def language(text: str) -> str | None:
    """The code of a text's language (ISO 639-1, or 639-3 where that has none); None where none is likely, as for a few
    words, formulas and code."""
    code, probability = _identifier().classify(text)
    return code if probability >= _MIN_PROBABILITY and code != _NOT_A_LANGUAGE else None


def known_languages() -> list[str]:
    """The codes that `language` returns."""
    return sorted(set(_identifier().labels) - {_NOT_A_LANGUAGE})


@cache
def _identifier() -> Any:
    """The model inside the package: nothing is downloaded."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
