"""Examples from files of any kind that `megatron_tpt.records` reads. Everything streams."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.conversations import BadExample, Example, ExampleFormat
from megatron_tpt.records import DAMAGED, Source, describe, read_rows

_ROWS_PER_BATCH = 256
_BYTES_PER_BATCH = 4 << 20


def read_examples(path: Path, format: ExampleFormat) -> Iterator[tuple[int, Example | BadExample]]:
    """Number (from 1) and example, or what is wrong, of every line or row of a file. Blank lines are skipped."""
    batch: list[tuple[int, dict[str, Any] | BadExample]] = []
    num_bytes = 0
    for number, fields, size in _read_fields(path, format.columns):
        batch.append((number, fields))
        num_bytes += size
        if num_bytes >= _BYTES_PER_BATCH or len(batch) >= _ROWS_PER_BATCH:
            yield from _encode(batch, format)
            batch, num_bytes = [], 0
    yield from _encode(batch, format)


def _encode(
    batch: Sequence[tuple[int, dict[str, Any] | BadExample]], format: ExampleFormat
) -> Iterator[tuple[int, Example | BadExample]]:
    encoded = iter(format.encode_batch([fields for _, fields in batch if not isinstance(fields, BadExample)]))
    for number, fields in batch:
        yield number, fields if isinstance(fields, BadExample) else next(encoded)


def _read_fields(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | BadExample, int]]:
    """Number, fields and about the size in characters of every line or row."""
    source = Source(str(path), None, path)
    for row in read_rows(source, columns):
        if row.problem == DAMAGED:
            raise UserError(describe(source, row))
        if row.value is None:
            yield row.number + 1, BadExample(str(row.problem), row.detail.removeprefix("(").removesuffix(")")), 0
        else:
            yield row.number + 1, row.value, _num_characters(row.value)


def _num_characters(value: Any) -> int:
    """Characters in all strings of a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list) else 0
