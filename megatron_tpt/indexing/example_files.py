"""Files of examples, read field by field: JSON lines (plain, gzip, Zstandard), Parquet, Arrow. Everything streams."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.conversations import BadExample, Example, ExampleFormat
from megatron_tpt.records import Columns
from megatron_tpt.records.tables import arrow_pieces, parquet_pieces

_ROWS_PER_BATCH = 256
_BYTES_PER_BATCH = 4 << 20


class FieldBatch(NamedTuple):
    """Consecutive records of a file."""

    path: Path
    records: list[tuple[int, dict[str, Any] | BadExample]]
    """Number in the file, from 1, and fields, or what is wrong with the line."""

    def __str__(self) -> str:
        return f"{self.path}:{self.records[0][0]}-{self.records[-1][0]}"


class EncodedBatch(NamedTuple):
    """What became of a batch."""

    outcomes: list[tuple[int, list[Example] | BadExample]]
    """Number and examples of every record, or what is wrong with it."""
    notes: Counter[str]
    """What of the records had no effect, in words, with the number of records."""


def read_examples(path: Path, format: ExampleFormat) -> Iterator[tuple[int, Example | BadExample]]:
    """Number (from 1) and examples, or what is wrong, of every line or row of a file. Blank lines are skipped."""
    for batch in read_batches(path, format):
        for number, outcome in encode_batch(batch, format).outcomes:
            for one in [outcome] if isinstance(outcome, BadExample) else outcome:
                yield number, one


def read_batches(path: Path, format: ExampleFormat) -> Iterator[FieldBatch]:
    """The records of a file in batches of bounded size. Blank lines are skipped."""
    batch = FieldBatch(path, [])
    num_bytes = 0
    for number, fields, size in _read_fields(path, format.columns):
        batch.records.append((number, fields))
        num_bytes += size
        if num_bytes >= _BYTES_PER_BATCH or len(batch.records) >= _ROWS_PER_BATCH:
            yield batch
            batch, num_bytes = FieldBatch(path, []), 0
    if batch.records:
        yield batch


def encode_batch(batch: FieldBatch, format: ExampleFormat) -> EncodedBatch:
    """What becomes of every record of a batch."""
    encoded = iter(format.encode_batch([fields for _, fields in batch.records if not isinstance(fields, BadExample)]))
    outcomes = [
        (number, fields if isinstance(fields, BadExample) else next(encoded)) for number, fields in batch.records
    ]
    return EncodedBatch(outcomes, format.take_notes())


def _read_fields(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | BadExample, int]]:
    """Number, fields and size in bytes of every line or row."""
    if path.name.endswith((".parquet", ".arrow")):
        for number, row in enumerate(_table_rows(path, columns), start=1):
            yield number, row, 0
        return
    import pyarrow

    try:
        # Unlike Python's readers, pyarrow's find every packed file that was cut short.
        with pyarrow.input_stream(str(path)) as stream, io.BufferedReader(stream, 1 << 20) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark some editors write
                if line.strip():
                    yield number, _json_object(line), len(line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read, or damaged ({error}); make or fetch it again") from None


def _json_object(line: bytes) -> dict[str, Any] | BadExample:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadExample("not UTF-8", f"{error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadExample("not JSON", str(error))
    return fields if isinstance(fields, dict) else BadExample("no JSON object", f"it is a {type(fields).__name__}")


def _table_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow

    is_parquet = path.name.endswith(".parquet")
    pieces = (parquet_pieces if is_parquet else arrow_pieces)(path, Columns(",".join(columns)), lambda _: None)
    try:
        for piece in pieces:
            for batch in piece.batches():
                yield from batch.select(list(columns)).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "Parquet" if is_parquet else "Arrow"
        raise UserError(f"{path}: not readable as {kind} ({str(error).splitlines()[0]})") from None
