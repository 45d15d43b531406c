"""The join x = [d; t]: how a document and the thinking about it become one training sample.

What stands between the think tags, tags included, is thinking; all else, the end-of-sequence token included,
is document: this is how the trainer tells the two apart. The document's own tokens are the same in every
join, so that the arms of a study differ in nothing else.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from megatron_tpt.records import Record


class Join(StrEnum):
    """The order of document and thinking; every sample ends with the end-of-sequence token."""

    document_thinking = "document_thinking"
    """document <think> thinking </think>; the document alone where it has no thinking. The paper's order."""
    thinking_document = "thinking_document"
    """<think> thinking </think> document; the document alone where it has no thinking."""
    thinking_only = "thinking_only"
    """<think> thinking </think>; a record without thinking is a bad record."""
    document_only = "document_only"
    """document, whether or not it has thinking."""


class Piece(NamedTuple):
    """A stretch of a sample, tokenised on its own."""

    text: str
    is_thinking: bool
    """The tokens of "<think>" and "</think>" go around it."""


def pieces(record: Record, join: Join) -> Iterator[Piece]:
    """The pieces of `record`'s sample in order; none when the join needs thinking and there is none."""
    thinking = record.thinking and Piece(f"\n{record.thinking.strip()}\n", is_thinking=True)
    if thinking and join in (Join.thinking_document, Join.thinking_only):
        yield thinking
    if join is not Join.thinking_only:
        yield Piece(record.text, is_thinking=False)
    if thinking and join is Join.document_thinking:
        yield thinking
