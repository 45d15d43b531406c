"""Blocks of records to documents of tokens: what an indexing job does in its threads."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import numpy
import pyarrow

from megatron_tpt.indexing.assemble import Assembler, Documents
from megatron_tpt.indexing.blocks import Block, End
from megatron_tpt.indexing.encoders import Encoded, ReferenceEncoder, SpotCheck
from megatron_tpt.indexing.groups import Joined, join_blocks
from megatron_tpt.indexing.index_job import IndexJob
from megatron_tpt.indexing.join import Join
from megatron_tpt.indexing.pieces import Flags, Pieces, Rows
from megatron_tpt.indexing.raw_tags import RawTags
from megatron_tpt.indexing.writer import MAX_DOCUMENT_TOKENS
from megatron_tpt.records import Row

_NO_TOKENS, _TOO_LONG, _FIXED_TAG = "no tokens", "too long", "a think tag in raw text"
_DETAILS = {
    _NO_TOKENS: "(the tokenizer knows no character of it)",
    _FIXED_TAG: "(the tokenizer has no think tokens, and one way to spell the tag: add them to it, or give --join "
    "document_only)",
    _TOO_LONG: f"(a sequence of the format holds {MAX_DOCUMENT_TOKENS:,} tokens)",
}


class Result(NamedTuple):
    """The results of some rows."""

    documents: Documents
    skipped: Counter[str]
    num_rows: int
    problem: Row | None
    """The bad record that stops the run; its number counts from the first of these rows."""


class BlockEncoder:
    """Parses, encodes and assembles the records of blocks. Its methods are called by several threads."""

    def __init__(self, job: IndexJob) -> None:
        tokenizer, options = job.tokenizer, job.options
        self._stops_at_bad = options.on_bad_record == "stop"
        self._maker, self._encoder = job.maker, job.encoder
        reference = isinstance(job.encoder, ReferenceEncoder)
        self._check = None if reference else SpotCheck(tokenizer, job.encoder).check
        end_ids = [tokenizer.eos_id] if options.append_eos else []
        dtype = numpy.dtype(job.template.dtype)
        self._assembler = Assembler(tokenizer.open_ids, tokenizer.close_ids, end_ids, dtype)
        self._raw_tags = RawTags([] if options.join is Join.document_only else tokenizer.tag_spellings())

    def encode(self, group: list[Block | End]) -> list[Result | End]:
        """The results of blocks, and the ends between them."""
        is_whole = self._maker.selection.where is None  # else documents are not as many as rows
        joined = join_blocks(group) if is_whole else None
        if joined is not None and (together := self._encode_joined(joined)) is not None:
            return [item if isinstance(item, End) else next(together) for item in group]
        return [result for item in group for result in self._encode_one(item)]

    def _encode_one(self, item: Block | End) -> Iterator[Result | End]:
        if isinstance(item, End):
            yield item
        else:
            yield from (self._encode_pieces(*part) for part in self._maker.make(item.rows))

    def _encode_joined(self, joined: Joined) -> Iterator[Result] | None:
        """The results of several blocks at once; None where the records have to be checked block by block."""
        (rows, pieces), *more = self._maker.make(joined.rows)
        if more or pieces.skipped or pieces.problem:
            return None
        result = self._encode_pieces(rows, pieces)
        num_rows = sum(joined.num_rows)
        if result.problem or result.skipped or len(result.documents) != num_rows:  # blank lines make no document
            return None
        ends = accumulate(joined.num_rows)
        return (
            Result(result.documents.part(end - count, end), Counter(), count, None)
            for count, end in zip(joined.num_rows, ends, strict=True)
        )

    def _encode_pieces(self, rows: Rows, pieces: Pieces) -> Result:
        encoded = self._encoder.encode(pieces.texts)
        if self._check is not None:
            self._check(pieces.texts, encoded)
        encoded = self._raw_tags.spell_out(encoded, pieces.flags)
        skipped, problem = pieces.skipped, pieces.problem
        for reason, find_bad in (
            (_NO_TOKENS, _are_empty),
            (_FIXED_TAG, self._raw_tags.find_fixed),
            (_TOO_LONG, self._assembler.are_too_long),
        ):
            is_bad = find_bad(encoded, pieces.flags)
            if is_bad.any():
                if self._stops_at_bad:
                    return Result(self._assembler.nothing(), skipped, 0, self._bad_row(rows, pieces, is_bad, reason))
                pieces, encoded, num_dropped = _without(is_bad, pieces, encoded)
                skipped = skipped + Counter({reason: num_dropped})
        documents = self._assembler.assemble(encoded, pieces.flags)
        return Result(documents, skipped, pieces.num_rows, problem)

    def _bad_row(self, rows: Rows, pieces: Pieces, is_bad: numpy.ndarray, reason: str) -> Row:
        number = self._maker.row_number(rows, int(pieces.document_numbers[numpy.argmax(is_bad)]))
        return Row(number, None, reason, _DETAILS[reason])


def _are_empty(encoded: Encoded, _: Flags) -> numpy.ndarray:
    return encoded.lengths == 0


def _without(is_bad: numpy.ndarray, pieces: Pieces, encoded: Encoded) -> tuple[Pieces, Encoded, int]:
    """Without the documents of which a piece is bad, and how many these are."""
    numbers = pieces.document_numbers
    dropped = numpy.unique(numbers[is_bad])
    keep = ~numpy.isin(numbers, dropped)
    kept = replace(pieces, texts=pieces.texts.filter(pyarrow.array(keep)), flags=pieces.flags[keep])
    tokens = encoded.tokens[numpy.repeat(keep, encoded.lengths)]
    return kept, Encoded(tokens, encoded.lengths[keep]), len(dropped)
