"""Tokens of pieces assembled into documents, with think tags and end-of-sequence tokens between them."""

from dataclasses import dataclass

import numpy

from megatron_tpt.indexing import writer
from megatron_tpt.indexing.encoders import Encoded
from megatron_tpt.indexing.pieces import CLOSE, DOCUMENT_END, OPEN, SEQUENCE_END, THINKING, Flags


@dataclass(frozen=True)
class Documents:
    """Documents as an index holds them, one after another."""

    tokens: numpy.ndarray
    """[num_tokens], of the index's type."""
    sequence_lengths: numpy.ndarray
    """Tokens of each sequence, [num_sequences], int32."""
    sequences_per_document: numpy.ndarray
    """[num_documents], int64."""
    thinking_tokens: numpy.ndarray
    """Of each document, tags included, [num_documents], int64."""

    def __len__(self) -> int:
        return len(self.sequences_per_document)

    def token_bounds(self) -> numpy.ndarray:
        """Where each document begins, and the end, in tokens: [num_documents + 1]."""
        sequence_ends = numpy.concatenate([[0], numpy.cumsum(self.sequence_lengths, dtype=numpy.int64)])
        return sequence_ends[numpy.concatenate([[0], numpy.cumsum(self.sequences_per_document)])]

    def part(self, first: int, end: int) -> "Documents":
        """Documents first ... end - 1, not copied."""
        sequence_bounds = numpy.concatenate([[0], numpy.cumsum(self.sequences_per_document)])[[first, end]]
        token_bounds = self.token_bounds()[[first, end]]
        return Documents(
            self.tokens[slice(*token_bounds)],
            self.sequence_lengths[slice(*sequence_bounds)],
            self.sequences_per_document[first:end],
            self.thinking_tokens[first:end],
        )


@dataclass(frozen=True)
class Assembler:
    """Puts tags and ends of documents between the tokens of pieces."""

    open_ids: list[int]
    close_ids: list[int]
    end_ids: list[int]
    """What a document ends with: the end-of-sequence token, or nothing."""
    dtype: numpy.dtype

    def lengths(self, encoded: Encoded, flags: Flags) -> numpy.ndarray:
        """Tokens of each piece with what is put around it, [num_pieces]."""
        opens, closes, ends = ((flags & flag) > 0 for flag in (OPEN, CLOSE, DOCUMENT_END))
        return encoded.lengths + len(self.open_ids) * opens + len(self.close_ids) * closes + len(self.end_ids) * ends

    def are_too_long(self, encoded: Encoded, flags: Flags) -> numpy.ndarray:
        """Whether each piece is of a sequence that is too long for the format, [num_pieces]."""
        sequence_ends = (flags & SEQUENCE_END) > 0
        sequence_lengths = numpy.diff(numpy.cumsum(self.lengths(encoded, flags))[sequence_ends], prepend=0)
        return (sequence_lengths > writer.MAX_DOCUMENT_TOKENS)[numpy.cumsum(sequence_ends) - sequence_ends]

    def assemble(self, encoded: Encoded, flags: Flags) -> Documents:
        """The documents of pieces, whose flags are [num_pieces] and of which none is too long."""
        opens, closes, ends = ((flags & flag) > 0 for flag in (OPEN, CLOSE, DOCUMENT_END))
        lengths = self.lengths(encoded, flags)
        thinking_lengths = (lengths - len(self.end_ids) * ends) * ((flags & THINKING) > 0)
        piece_ends = numpy.cumsum(lengths)
        tokens = numpy.empty(int(piece_ends[-1]) if len(piece_ends) else 0, self.dtype)
        is_text = numpy.ones(len(tokens), bool)

        def put(ids: list[int], places: numpy.ndarray) -> None:
            for offset, id in enumerate(ids):
                tokens[places + offset] = id
                is_text[places + offset] = False

        put(self.open_ids, (piece_ends - lengths)[opens])
        put(self.close_ids, (piece_ends - len(self.close_ids) - len(self.end_ids) * ends)[closes])
        put(self.end_ids, (piece_ends - len(self.end_ids))[ends])
        tokens[is_text] = encoded.tokens
        sequence_ends = (flags & SEQUENCE_END) > 0
        sequence_lengths = numpy.diff(piece_ends[sequence_ends], prepend=0)
        assert sequence_lengths.max(initial=0) <= writer.MAX_DOCUMENT_TOKENS
        return Documents(
            tokens,
            sequence_lengths.astype(numpy.int32),
            numpy.diff(numpy.cumsum(sequence_ends)[ends], prepend=0),
            numpy.diff(numpy.cumsum(thinking_lengths)[ends], prepend=0),
        )

    def nothing(self) -> Documents:
        """No document."""
        no_tokens = Encoded(numpy.zeros(0, self.dtype), numpy.zeros(0, numpy.int64))
        return self.assemble(no_tokens, numpy.zeros(0, numpy.uint8))
