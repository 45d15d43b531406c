"""Markdown made of untrusted text: ids, names and documents show as they are, and nothing in them is markup."""

import re
from collections.abc import Iterable, Sequence

from megatron_tpt.names import shown

# An underscore inside a word means nothing, and reason codes are full of them; nor do brackets without a target.
_MARKUP = re.compile(r"[\\`*|~#$]|\](?=[(\[:])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=\bwww)\.|(?<=\w)@")
_PLAIN = re.compile(r"[A-Za-z0-9 ._:/#+,=@-]*[A-Za-z0-9]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def inline(text: str) -> str:
    """A text on one line, without links, images, HTML or other markup."""
    text = shown(" ".join(text.split()))
    text = _MARKUP.sub(lambda match: "\\" + match[0], text)
    return "".join(_ENTITIES.get(character, character) for character in text)


def code(text: str) -> str:
    """A plain name or id in a code span, any other text as `inline` has it: not all programs agree where spans end."""
    return f"`{text}`" if _PLAIN.fullmatch(text) else inline(text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts; the first column is aligned to the left, the others to the right."""
    lines = [list(map(inline, header)), ["---", *("---:" for _ in header[1:])], *(map(inline, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
