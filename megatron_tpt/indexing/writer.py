"""A streaming writer of Megatron Core's indexed dataset, MMIDIDX version 1, byte for byte as Megatron writes
it.

`.bin`: the tokens of all documents, one after the other. `.idx` (little-endian):

    9 bytes  "MMIDIDX\\0\\0"          8 bytes  version, 1                1 byte  code of the token type
    8 bytes  number of sequences     8 bytes  number of documents + 1
    int32    length of each sequence, in tokens
    int64    offset of each sequence in `.bin`, in bytes
    int64    first sequence of each document, and the number of sequences at the end

A document is one sequence, or several (sentences). Memory does not grow with the data: the lengths go to the file as
they come, the offsets follow from them when all are known. The bounds of documents are kept in a file of their own
until then, where documents are not the sequences.
"""

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.files import no_links

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {"uint16": 8, "int32": 4}
MAX_DOCUMENT_TOKENS = 2**31 - 1  # the length is an int32
_BUFFER_BYTES = 1 << 20
_ROWS_PER_CHUNK = 1 << 18


def token_dtype(vocab_size: int) -> str:
    """The type Megatron Core stores tokens in: the bound is that of its `DType.optimal_dtype`."""
    return "uint16" if vocab_size < 65500 else "int32"


def idx_bytes(num_documents: int, num_sequences: int | None = None) -> int:
    """The length of the `.idx` of `num_documents` documents, of one sequence each where `num_sequences` is not
    given."""
    num_sequences = num_documents if num_sequences is None else num_sequences
    return HEADER.size + (4 + 8) * num_sequences + 8 * (num_documents + 1)


def _open(path: Path, mode: str) -> IO[bytes]:
    return open(path, mode, buffering=_BUFFER_BYTES, opener=no_links)


class Extent(NamedTuple):
    """How much an index holds."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0


class IndexWriter:
    """Writes one `.bin` and its `.idx`. Use it as a context manager; without an error it ends with complete
    files.

    With `resume_at`, it continues after that many documents of files that another writer left, complete or not.
    """

    def __init__(
        self,
        bin_path: Path,
        idx_path: Path,
        vocab_size: int,
        *,
        has_sentences: bool = False,
        resume_at: Extent | None = None,
    ) -> None:
        self.extent = resume_at or Extent()
        self._vocab_size = vocab_size
        self._dtype = numpy.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._bin_digest = hashlib.sha256()
        self._bin_path, self._idx_path = bin_path, idx_path
        mode = "wb" if resume_at is None else "r+b"
        self._bin: IO[bytes] = _open(bin_path, mode)
        self._idx: IO[bytes] = _open(idx_path, "w+b" if resume_at is None else mode)
        self._ends_path = Path(f"{idx_path}-documents")
        self._ends: IO[bytes] | None = None
        if has_sentences:
            self._ends = _open(self._ends_path, "w+b" if resume_at is None else mode)
        if resume_at is not None:
            self._cut_back()
        else:
            self._idx.write(self._header())

    @property
    def num_documents(self) -> int:
        return self.extent.documents

    @property
    def num_tokens(self) -> int:
        return self.extent.tokens

    def add_document(self, tokens: numpy.ndarray[tuple[int], Any]) -> None:
        """Append one document of one sequence, `[num_tokens]` of any integer type. Raises UserError when it is too
        long for the format.
        """
        if len(tokens) > MAX_DOCUMENT_TOKENS:
            raise UserError(
                f"a document of {len(tokens)} tokens is too long, the format holds {MAX_DOCUMENT_TOKENS}: split it"
            )
        self.add_documents(tokens, numpy.array([len(tokens)], numpy.int32), numpy.ones(1, numpy.int64))

    def add_documents(
        self, tokens: numpy.ndarray, sequence_lengths: numpy.ndarray, sequences_per_document: numpy.ndarray
    ) -> None:
        """Append documents: tokens [num_tokens], lengths int32 [num_sequences], numbers of sequences [num_documents].

        A document has several sequences only in a writer that was made with `has_sentences`.
        """
        assert tokens.min(initial=0) >= 0 and tokens.max(initial=0) < self._vocab_size
        assert self._ends is not None or len(sequence_lengths) == len(sequences_per_document)
        data = numpy.ascontiguousarray(tokens, self._dtype).view(numpy.uint8).data
        self._bin.write(data)
        self._bin_digest.update(data)
        self._idx.write(numpy.ascontiguousarray(sequence_lengths, "<i4").tobytes())
        if self._ends is not None:
            self._ends.write((self.extent.sequences + numpy.cumsum(sequences_per_document)).astype("<i8").tobytes())
        self.extent = Extent(
            self.extent.documents + len(sequences_per_document),
            self.extent.sequences + len(sequence_lengths),
            self.extent.tokens + len(tokens),
        )

    def flush(self) -> list[int]:
        """Hand everything to the operating system; returns the files to sync where it must outlive a power cut."""
        files = [file for file in (self._bin, self._idx, self._ends) if file is not None]
        for file in files:
            file.flush()
        return [file.fileno() for file in files]

    def checksums(self) -> dict[str, str]:
        """SHA-256 of both files, once they are complete."""
        with self._idx_path.open("rb") as file:
            idx_digest = hashlib.file_digest(file, "sha256")
        return {"bin": f"sha256:{self._bin_digest.hexdigest()}", "idx": f"sha256:{idx_digest.hexdigest()}"}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.closing(self._bin), contextlib.closing(self._idx):  # which may be closed already, with an error
            if kind is None:
                self._finish()
            if self._ends is not None:
                self._ends.close()

    def _cut_back(self) -> None:
        """Remove what is beyond the documents to resume after."""
        documents, sequences, tokens = self.extent
        cuts = [(self._bin, tokens * self._dtype.itemsize), (self._idx, HEADER.size + 4 * sequences)]
        if self._ends is not None:
            cuts.append((self._ends, 8 * documents))
        for file, num_bytes in cuts:
            if os.fstat(file.fileno()).st_size < num_bytes:
                raise UserError(f"{file.name}: shorter than it was; remove {self._bin_path.parent} and index again")
            file.truncate(num_bytes)
            file.seek(num_bytes)
        with self._bin_path.open("rb") as file:
            self._bin_digest = hashlib.file_digest(file, "sha256")  # type: ignore[assignment]

    def _header(self) -> bytes:
        code = DTYPE_CODES[self._dtype.name]
        return HEADER.pack(MAGIC, VERSION, code, self.extent.sequences, self.extent.documents + 1)

    def _finish(self) -> None:
        """Add to the lengths, which are in the file already, what follows from them."""
        num_sequences = self.extent.sequences
        offset = 0
        for first in range(0, num_sequences, _ROWS_PER_CHUNK):
            count = min(_ROWS_PER_CHUNK, num_sequences - first)
            self._idx.seek(HEADER.size + 4 * first)
            lengths = numpy.frombuffer(self._idx.read(4 * count), dtype="<i4").astype("<i8")
            ends = offset + numpy.cumsum(lengths) * self._dtype.itemsize
            self._idx.seek(HEADER.size + 4 * num_sequences + 8 * first)
            self._idx.write((ends - lengths * self._dtype.itemsize).tobytes())
            offset = int(ends[-1])
        self._idx.seek(0, 2)
        for bounds in self._document_bounds():
            self._idx.write(bounds)
        self._idx.seek(0)
        self._idx.write(self._header())

    def _document_bounds(self) -> Iterator[bytes]:
        if self._ends is not None:
            yield bytes(8)
            self._ends.seek(0)
            while ends := self._ends.read(_BUFFER_BYTES):
                yield ends
            return
        for first in range(0, self.extent.documents + 1, _ROWS_PER_CHUNK):
            last = min(first + _ROWS_PER_CHUNK, self.extent.documents + 1)
            yield numpy.arange(first, last, dtype="<i8").tobytes()
