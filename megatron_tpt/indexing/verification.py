"""Whether the parts of an index agree with each other, in bounded memory; a mismatch is located by file and byte."""

from collections.abc import Iterator
from pathlib import Path

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.files import file_checksum
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.writer import HEADER

_ROWS_PER_CHUNK = 1 << 20
_TOKENS_PER_CHUNK = 1 << 22


def row_chunks(num_rows: int) -> Iterator[slice]:
    """Slices of a bounded number of rows that cover `num_rows`."""
    for first in range(0, num_rows, _ROWS_PER_CHUNK):
        yield slice(first, min(first + _ROWS_PER_CHUNK, num_rows))


def check_structure(reader: IndexReader) -> None:
    """Raise UserError, naming file and byte, unless lengths, offsets and documents agree with each other."""
    path, count = f"{reader.prefix}.idx", reader.num_sequences
    offsets_begin, bounds_begin = HEADER.size + 4 * count, HEADER.size + 12 * count

    def require(holds: numpy.ndarray, begin: int, itemsize: int, what: str) -> None:
        if not holds.all():
            row = int(numpy.argmin(holds))
            raise UserError(f"{path}: damaged at byte {begin + itemsize * row}: {what.format(row=row)}; index again")

    expected = 0
    for rows in row_chunks(count):
        lengths = reader.sequence_lengths[rows].astype(numpy.int64)
        at = f"sequence {{row}} (counted from {rows.start})" if rows.start else "sequence {row}"
        require(lengths >= 0, HEADER.size + 4 * rows.start, 4, f"the length of {at} is negative")
        ends = expected + numpy.cumsum(lengths) * reader.dtype.itemsize
        begins = ends - lengths * reader.dtype.itemsize
        found = reader.sequence_offsets[rows]
        require(
            found == begins, offsets_begin + 8 * rows.start, 8, f"the offset of {at} is not where the last one ends"
        )
        expected = int(ends[-1])
    bounds = reader.document_bounds
    require(bounds[:1] == 0, bounds_begin, 8, "the first document does not begin with the first sequence")
    for rows in row_chunks(len(bounds) - 1):
        grows = numpy.diff(bounds[rows.start : rows.stop + 1]) >= 0
        at = f"document {{row}} (counted from {rows.start})" if rows.start else "document {row}"
        require(grows, bounds_begin + 8 * (rows.start + 1), 8, f"{at} ends before it begins")
    last = bounds_begin + 8 * (len(bounds) - 1)
    require(bounds[-1:] == count, last, 8, f"the last document does not end with the last of {count} sequences")


def verify(prefix: str | Path) -> Manifest:
    """Read the whole index and return its manifest; raise UserError at the first thing that is not as it must be.

    Checked: the sizes, the structure of `.idx`, the counts, that every token is one of the tokenizer's, that every
    document ends with its end-of-sequence token (where the manifest says so), and the checksums, which come last: what
    is found before them can say where the damage is.
    """
    manifest = Manifest.read(prefix)
    manifest.check_files(prefix)
    reader = IndexReader(prefix)
    check_structure(reader)
    counts = manifest.counts
    found = {"documents": reader.num_documents, "tokens": reader.num_tokens}
    for name, number in found.items():
        if number != (expected := getattr(counts, name)):
            raise UserError(
                f"{prefix}.idx: holds {number} {name}, {Manifest.path(prefix)} says {expected}; index again"
            )
    _check_tokens(reader, manifest)
    for kind, checksum in manifest.checksums.items():
        path = Path(f"{prefix}.{kind}")
        if (digest := file_checksum(path)) != checksum:
            raise UserError(
                f"{path}: damaged: some of its bytes changed (checksum {digest}, not {checksum}); index again"
            )
    return manifest


def _check_tokens(reader: IndexReader, manifest: Manifest) -> None:
    path, itemsize, vocab_size = f"{reader.prefix}.bin", reader.dtype.itemsize, manifest.tokenizer.vocab_size
    for first in range(0, reader.num_tokens, _TOKENS_PER_CHUNK):
        tokens = reader.tokens[first : first + _TOKENS_PER_CHUNK]
        unknown = (tokens < 0) | (tokens >= vocab_size)
        if unknown.any():
            place = int(numpy.argmax(unknown))
            raise UserError(
                f"{path}: damaged at byte {itemsize * (first + place)}: token {tokens[place]} is none of the "
                f"tokenizer's {vocab_size}; index again"
            )
    if not manifest.append_eos:
        return
    for rows in row_chunks(reader.num_documents):
        bounds = reader.document_bounds[rows.start : rows.stop + 1]
        last_sequences = bounds[1:] - 1
        lengths, offsets = reader.sequence_lengths[last_sequences], reader.sequence_offsets[last_sequences]
        places = offsets // itemsize + lengths - 1
        wrong = (numpy.diff(bounds) == 0) | (lengths == 0)
        wrong |= numpy.where(wrong, True, reader.tokens[places] != manifest.tokenizer.eos_id)
        if wrong.any():
            row = int(numpy.argmax(wrong))
            raise UserError(
                f"{path}: damaged at byte {itemsize * max(0, int(places[row]))}: document {rows.start + row} does not "
                f"end with the end-of-sequence token {manifest.tokenizer.eos_id}; index again"
            )
