"""The join x = [d; t]: how a document and the thinking about it become one training sample.

What is between the think tags, tags included, is thinking; all else, the end-of-sequence token included,
is document: this is how the trainer distinguishes the two. The document's own tokens are the same in every
join but the interleaved one, so that the arms of a study differ in nothing else.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Any, NamedTuple

from megatron_tpt.records.record import BadRecord, Record

NO_THINKING = "no thinking"
"""What is wrong with a record whose join needs thinking."""


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
    interleaved = "interleaved"
    """text <think> thinking </think> text <think> ..., by the record's `meta.chunks`; as document_thinking where it
    has none.
    """


class Piece(NamedTuple):
    """A stretch of a sample, tokenized on its own."""

    text: str
    is_thinking: bool
    """The tokens of "<think>" and "</think>" go around it."""


def thinking_text(thinking: str) -> str:
    """What is between the think tags."""
    return f"\n{thinking.strip()}\n"


def pieces(record: Record, join: Join) -> Iterator[Piece]:
    """The pieces of `record`'s sample in order. Raises BadRecord when the record has not what the join needs."""
    if join is Join.interleaved and "chunks" in record.meta:
        yield from _chunk_pieces(record, record.meta["chunks"])
        return
    thinking = record.thinking and Piece(thinking_text(record.thinking), is_thinking=True)
    if join is Join.thinking_only and not thinking:
        raise BadRecord(NO_THINKING, "(join thinking_only needs it)")
    if thinking and join in (Join.thinking_document, Join.thinking_only):
        yield thinking
    if join is not Join.thinking_only:
        yield Piece(record.text, is_thinking=False)
    if thinking and join in (Join.document_thinking, Join.interleaved):
        yield thinking


def _chunk_pieces(record: Record, chunks: Any) -> Iterator[Piece]:
    """Slices of text and thinking in turn; text after the last chunk has no thinking."""
    text, thinking = record.text, record.thinking or ""
    text_end = thinking_end = 0
    if not isinstance(chunks, list):
        raise _bad_chunks("it is no list")
    for number, chunk in enumerate(chunks):
        text_begin, thinking_begin = text_end, thinking_end
        text_end, thinking_end = _ends(chunk, number)
        if not (text_begin <= text_end <= len(text) and thinking_begin <= thinking_end <= len(thinking)):
            raise _bad_chunks(f"chunk {number} ends before it begins, or after the text or thinking does")
        if text_begin < text_end:
            yield Piece(text[text_begin:text_end], is_thinking=False)
        if thinking[thinking_begin:thinking_end].strip():
            yield Piece(thinking_text(thinking[thinking_begin:thinking_end]), is_thinking=True)
    if thinking[thinking_end:].strip():
        raise _bad_chunks("thinking is left after the last chunk")
    if text_end < len(text):
        yield Piece(text[text_end:], is_thinking=False)


def _ends(chunk: Any, number: int) -> tuple[int, int]:
    chunk = chunk if isinstance(chunk, dict) else {}
    text_end, thinking_end = chunk.get("text_end"), chunk.get("thinking_end")
    if type(text_end) is not int or type(thinking_end) is not int:
        raise _bad_chunks(f'chunk {number} is not {{"text_end": integer, "thinking_end": integer}}')
    return text_end, thinking_end


def _bad_chunks(detail: str) -> BadRecord:
    return BadRecord("bad chunks", f"in meta.chunks ({detail})")
