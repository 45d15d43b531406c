"""A streaming writer of Megatron Core's indexed dataset, MMIDIDX version 1, byte for byte as Megatron writes
it.

`.bin`: the tokens of all documents, one after the other. `.idx` (little-endian):

    9 bytes  "MMIDIDX\\0\\0"          8 bytes  version, 1                1 byte  code of the token type
    8 bytes  number of sequences     8 bytes  number of documents + 1
    int32    length of each sequence, in tokens
    int64    offset of each sequence in `.bin`, in bytes
    int64    first sequence of each document, and the number of sequences at the end

A document is one sequence here. Memory does not grow with the data: the lengths go to the file as they come,
offsets and documents follow from them when all are known.
"""

import hashlib
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy

from megatron_tpt.errors import UserError

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


def idx_bytes(num_documents: int) -> int:
    """The length of the `.idx` of so many documents of one sequence each."""
    return HEADER.size + (4 + 8 + 8) * num_documents + 8


class IndexWriter:
    """Writes one `.bin` and its `.idx`. Use it as a context manager; without an error it ends with complete
    files.
    """

    def __init__(self, bin_path: Path, idx_path: Path, vocab_size: int) -> None:
        self.num_documents = 0
        self.num_tokens = 0
        self._vocab_size = vocab_size
        self._dtype = numpy.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._bin_digest = hashlib.sha256()
        self._idx_path = idx_path
        self._bin: BinaryIO = bin_path.open("wb", buffering=_BUFFER_BYTES)
        self._idx: BinaryIO = idx_path.open("w+b", buffering=_BUFFER_BYTES)
        self._idx.write(self._header())

    def add_document(self, tokens: numpy.ndarray[tuple[int], Any]) -> None:
        """Append one document, `[num_tokens]` of any integer type. Raises UserError when it is too long for
        the format.
        """
        if len(tokens) > MAX_DOCUMENT_TOKENS:
            raise UserError(
                f"a document of {len(tokens)} tokens is too long, the format holds {MAX_DOCUMENT_TOKENS}: split it"
            )
        assert tokens.min(initial=0) >= 0 and tokens.max(initial=0) < self._vocab_size
        data = tokens.astype(self._dtype).tobytes()
        self._bin.write(data)
        self._bin_digest.update(data)
        self._idx.write(struct.pack("<i", len(tokens)))
        self.num_documents += 1
        self.num_tokens += len(tokens)

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
        with self._bin, self._idx:
            if kind is None:
                self._finish()

    def _header(self) -> bytes:
        code = DTYPE_CODES[self._dtype.name]
        return HEADER.pack(MAGIC, VERSION, code, self.num_documents, self.num_documents + 1)

    def _finish(self) -> None:
        """Add to the lengths, which are in the file already, what follows from them."""
        offset = 0
        for first in range(0, self.num_documents, _ROWS_PER_CHUNK):
            count = min(_ROWS_PER_CHUNK, self.num_documents - first)
            self._idx.seek(HEADER.size + 4 * first)
            lengths = numpy.frombuffer(self._idx.read(4 * count), dtype="<i4").astype("<i8")
            ends = offset + numpy.cumsum(lengths) * self._dtype.itemsize
            self._idx.seek(HEADER.size + 4 * self.num_documents + 8 * first)
            self._idx.write((ends - lengths * self._dtype.itemsize).tobytes())
            offset = int(ends[-1])
        self._idx.seek(0, 2)
        for first in range(0, self.num_documents + 1, _ROWS_PER_CHUNK):
            last = min(first + _ROWS_PER_CHUNK, self.num_documents + 1)
            self._idx.write(numpy.arange(first, last, dtype="<i8").tobytes())
        self._idx.seek(0)
        self._idx.write(self._header())
