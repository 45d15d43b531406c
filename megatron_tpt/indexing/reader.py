"""Reading an indexed dataset without torch: any MMIDIDX version 1, ours or Megatron's."""

from pathlib import Path
from typing import Any

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.writer import DTYPE_CODES, HEADER, MAGIC, VERSION

Array = numpy.ndarray[tuple[int], Any]


class IndexReader:
    """The documents of `PREFIX.bin/.idx`, mapped and only read on access.

    Raises UserError when the files are missing or do not fit together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = prefix
        bin_path, self._idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (bin_path, self._idx_path):
            if not path.is_file():
                raise UserError(f"{path}: no such file")
        with self._idx_path.open("rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            raise self._damaged("its header is truncated")
        magic, version, code, self.num_sequences, num_bounds = HEADER.unpack(header)
        dtypes = {code: name for name, code in DTYPE_CODES.items()}
        if magic != MAGIC or version != VERSION or code not in dtypes:
            raise self._damaged("it does not begin like an index of tokens (MMIDIDX version 1)")
        self.dtype = numpy.dtype(dtypes[code]).newbyteorder("<")
        self.num_documents = num_bounds - 1
        if num_bounds < 1 or self._idx_path.stat().st_size != HEADER.size + 12 * self.num_sequences + 8 * num_bounds:
            raise self._damaged("its length does not fit its counts")
        data = numpy.memmap(self._idx_path, mode="r")
        ends = HEADER.size + numpy.cumsum([0, 4 * self.num_sequences, 8 * self.num_sequences, 8 * num_bounds])
        self.sequence_lengths: Array = data[ends[0] : ends[1]].view("<i4")
        self.sequence_offsets: Array = data[ends[1] : ends[2]].view("<i8")
        self.document_bounds: Array = data[ends[2] : ends[3]].view("<i8")
        self.num_tokens = int(self.sequence_lengths.sum(dtype=numpy.int64))
        if bin_path.stat().st_size != self.num_tokens * self.dtype.itemsize:
            raise UserError(f"{bin_path}: damaged: its length does not fit {self._idx_path.name}; index again")
        self.tokens: Array = (
            numpy.memmap(bin_path, mode="r", dtype=self.dtype) if self.num_tokens else numpy.empty(0, self.dtype)
        )

    def __len__(self) -> int:
        return self.num_documents

    def document(self, number: int) -> Array:
        """The tokens of document `number`, counted from 0: `[num_tokens]`. UserError: there is no such
        document.
        """
        if not 0 <= number < self.num_documents:
            raise UserError(f"{self.prefix}: no document {number}; they are 0 to {self.num_documents - 1}")
        first, last = (int(bound) for bound in self.document_bounds[number : number + 2])
        start = int(self.sequence_offsets[first]) // self.dtype.itemsize if first < last else 0
        return self.tokens[start : start + int(self.sequence_lengths[first:last].sum(dtype=numpy.int64))]

    def document_lengths(self) -> Array:
        """The number of tokens of each document, `[num_documents]`."""
        ends = numpy.concatenate([[0], numpy.cumsum(self.sequence_lengths, dtype=numpy.int64)])
        return numpy.diff(ends[self.document_bounds])

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self._idx_path}: damaged: {what}; index again")
