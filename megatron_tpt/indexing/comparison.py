"""Where two indices begin to differ."""

from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_tpt.indexing.reader import Array, IndexReader
from megatron_tpt.indexing.verification import check_structure

_TOKENS_PER_CHUNK = 1 << 22


@dataclass(frozen=True)
class Difference:
    """The first document in which two indices differ, and how."""

    document: int
    token: int | None
    """The first token that differs, counted from 0 within the document; None where the document is only in one index,
    or is split into other sequences."""
    description: str


def first_difference(prefix: Path, other: Path) -> Difference | None:
    """The first difference between two indices; None when they hold the same documents of the same tokens. Raises
    UserError for a damaged one."""
    here, there = IndexReader(prefix), IndexReader(other)
    check_structure(here)
    check_structure(there)
    ours, theirs = here.document_lengths(), there.document_lengths()
    num_common = min(len(ours), len(theirs))
    document = _first(ours[:num_common] != theirs[:num_common])
    num_tokens = int(ours[:document].sum())
    if document < num_common:
        num_tokens += int(min(ours[document], theirs[document]))
    if (token := _first_token(here.tokens[:num_tokens], there.tokens[:num_tokens])) < num_tokens:
        ends = numpy.cumsum(ours)
        number = int(numpy.searchsorted(ends, token, side="right"))
        place = token - int(ends[number] - ours[number])
        values = f"{here.tokens[token]} here, {there.tokens[token]} there"
        return Difference(number, place, f"document {number}, token {place}: {values}")
    if document < num_common:
        place = int(min(ours[document], theirs[document]))
        text = (
            f"document {document} has {ours[document]} tokens here, {theirs[document]} there; the first {place} agree"
        )
        return Difference(document, place, text)
    if len(ours) != len(theirs):
        text = f"{len(ours)} documents here, {len(theirs)} there; the first {num_common} agree"
        return Difference(num_common, None, text)
    bounds = here.document_bounds != there.document_bounds
    if bounds.any() or not numpy.array_equal(here.sequence_lengths, there.sequence_lengths):
        number = max(0, _first(bounds) - 1)
        return Difference(
            number, None, f"the documents agree, but are split into other sequences from document {number} on"
        )
    return None


def _first(differs: Array) -> int:
    """The position of the first True, or the length."""
    return int(numpy.argmax(differs)) if differs.any() else len(differs)


def _first_token(here: Array, there: Array) -> int:
    for first in range(0, len(here), _TOKENS_PER_CHUNK):
        chunk = slice(first, first + _TOKENS_PER_CHUNK)
        if (differs := here[chunk] != there[chunk]).any():
            return first + int(numpy.argmax(differs))
    return len(here)
