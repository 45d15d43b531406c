"""The record, and the two ways in which foreign data can be bad."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ANSWER_BEGIN = "answer_begin"


@dataclass(frozen=True)
class Record:
    """A document, with the thinking about it once that has been written."""

    id: str
    """Given by the source, or `content_id(text)`."""
    text: str
    """The document; never blank."""
    thinking: str | None = None
    """The thinking about `text`, without tags."""
    meta: dict[str, Any] = field(default_factory=dict)
    """How the thinking came about (source, generator, prompt, sampling, finish_reason, token counts, ...) and the
    columns of the source that were asked for: JSON values."""


class BadRecord(Exception):
    """A line or row that is no record. `problem` is the same for all of its kind; `detail` says more, or is empty."""

    def __init__(self, problem: str, detail: str = "") -> None:
        super().__init__(f"{problem} {detail}".rstrip())
        self.problem = problem
        self.detail = detail


class DamagedSource(Exception):
    """A source that cannot be read from here on; `str()` says why on one line."""


def question_and_answer(text: str, meta: Mapping[str, Any]) -> tuple[str, str] | None:
    """The two parts of a text that `tools/curate.py` made of a question and its answer, by `meta.answer_begin`, the
    character at which the answer begins; None of any other text."""
    begin = meta.get(ANSWER_BEGIN)
    if not isinstance(begin, int) or isinstance(begin, bool) or not 0 <= begin < len(text):
        return None
    return text[:begin].removesuffix("\n"), text[begin:]


def content_id(text: str) -> str:
    """A record's id made from its content: the first 32 hex digits of SHA-256 over the UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
