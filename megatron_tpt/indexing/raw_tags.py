"""Think tags in raw text, for tokenizers without think tokens.

There a tag is ordinary tokens, and raw text that holds the tag can make the same tokens, after which all would count as
thinking. Such tokens are spelt differently: one of them becomes two that together are the same text. What is looked for
is tokens, not text, so nothing else changes, and the decoded text never does.
"""

from dataclasses import dataclass

import numpy

from megatron_tpt.indexing.encoders import Encoded
from megatron_tpt.indexing.marks import find
from megatron_tpt.indexing.pieces import CLOSE, DOCUMENT_END, OPEN, Flags
from megatron_tpt.indexing.tokenizer import Spelling


@dataclass(frozen=True)
class RawTags:
    """Finds the tokens of think tags in encoded raw text, and spells them differently."""

    spellings: list[Spelling]
    """Of the tags that are no tokens of the tokenizer."""

    def spell_out_text(self, tokens: numpy.ndarray) -> numpy.ndarray:
        """`spell_out` for the tokens of one text."""
        one = Encoded(tokens, numpy.array([len(tokens)]))
        return self.spell_out(one, numpy.zeros(1, dtype=numpy.uint8)).tokens

    def find_fixed(self, encoded: Encoded, flags: Flags) -> numpy.ndarray:
        """Which pieces hold a tag that the tokenizer can spell in one way only: bool [num_pieces]."""
        result = numpy.zeros(len(encoded.lengths), dtype=bool)
        for spelling in self.spellings:
            if spelling.parts is None:
                places = _places(encoded, flags, spelling.ids)
                result[numpy.searchsorted(encoded.lengths.cumsum(), places, side="right")] = True
        return result

    def spell_out(self, encoded: Encoded, flags: Flags) -> Encoded:
        """The same text without the tokens of a tag. What `find_fixed` finds stays."""
        for spelling in self.spellings:
            if spelling.parts is None or not len(places := _places(encoded, flags, spelling.ids)):
                continue
            first, second = spelling.parts
            places += spelling.place
            lengths = encoded.lengths.copy()
            numpy.add.at(lengths, numpy.searchsorted(encoded.lengths.cumsum(), places, side="right"), 1)
            tokens = encoded.tokens.copy()
            tokens[places] = first
            encoded = Encoded(numpy.insert(tokens, places + 1, second), lengths)
        return encoded


def _places(encoded: Encoded, flags: Flags, ids: list[int]) -> numpy.ndarray:
    """Where a tag's tokens are in raw text, even across two adjacent pieces."""
    places = find(encoded.tokens, ids)
    if not len(places):
        return places
    ends = encoded.lengths.cumsum()
    firsts, lasts = (numpy.searchsorted(ends, places + offset, side="right") for offset in (0, len(ids) - 1))
    parted = ((flags[:-1] & (CLOSE | DOCUMENT_END)) | (flags[1:] & OPEN)) > 0
    stretches = numpy.concatenate([[0], parted.cumsum()])
    return places[stretches[firsts] == stretches[lasts]]
