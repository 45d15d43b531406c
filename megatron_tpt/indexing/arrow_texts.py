"""Arrow's arrays of texts as NumPy sees them."""

from collections.abc import Sequence
from typing import Any

import numpy
import pyarrow
import pyarrow.compute

WHITESPACE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())  # what str.strip() takes away


def is_null(array: Any) -> numpy.ndarray:
    """Whether each value is null, bool [values]."""
    return array.is_null().to_numpy(zero_copy_only=False)


def is_blank(texts: pyarrow.LargeStringArray) -> numpy.ndarray:
    """Whether each text is empty or white space, [num_texts]; nulls are blank."""
    offsets, data = text_buffers(texts)
    found = offsets[1:] == offsets[:-1]
    first = data[numpy.minimum(offsets[:-1], max(len(data) - 1, 0))] if len(data) else numpy.zeros(len(texts), "u1")
    suspects = numpy.flatnonzero(~found & ((first <= 0x20) | (first >= 0x80)))
    if len(suspects):
        trimmed = pyarrow.compute.utf8_trim(texts.take(pyarrow.array(suspects)), characters=WHITESPACE)
        lengths = pyarrow.compute.binary_length(trimmed).fill_null(0).to_numpy(zero_copy_only=False)
        found[suspects] = lengths == 0
    return found


def array_of(texts: Sequence[str]) -> pyarrow.LargeStringArray:
    """The texts as an array. (`pyarrow.array` imports pandas for that, which takes 0.2 s.)"""
    parts = [text.encode() for text in texts]
    begins = numpy.cumsum([0, *map(len, parts)], dtype=numpy.int64)
    buffers = [None, pyarrow.py_buffer(begins), pyarrow.py_buffer(b"".join(parts))]
    return pyarrow.Array.from_buffers(pyarrow.large_string(), len(parts), buffers)


def text_buffers(texts: pyarrow.LargeStringArray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Where each text begins, with the end, [num_texts + 1], and the bytes: not copied."""
    _, offsets, data = texts.buffers()
    if offsets is None or not len(texts):
        return numpy.zeros(1, numpy.int64), numpy.zeros(0, numpy.uint8)
    begins = numpy.frombuffer(offsets, numpy.int64, len(texts) + 1, 8 * texts.offset)
    return begins, numpy.frombuffer(data if data is not None else b"", numpy.uint8)
