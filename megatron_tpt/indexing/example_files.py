"""Files of examples, read field by field: JSON lines (plain, gzip, Zstandard), Parquet, Arrow. Everything streams."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.conversations import BadExample, Example, ExampleFormat
from megatron_tpt.records import Columns
from megatron_tpt.records.tables import arrow_pieces, parquet_pieces

_ROWS_PER_BATCH = 256
_BYTES_PER_BATCH = 4 << 20


def read_examples(path: Path, format: ExampleFormat) -> Iterator[tuple[int, Example | BadExample]]:
    """Number (from 1) and example, or what is wrong, of every line or row of a file. Blank lines are passed over."""
    batch: list[tuple[int, dict[str, Any] | BadExample]] = []
    num_bytes = 0
    for number, fields, size in _read_fields(path, format):
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
        found = fields if isinstance(fields, BadExample) else next(encoded)
        for example in [found] if isinstance(found, BadExample) else found:
            yield number, example


def _read_fields(path: Path, format: ExampleFormat) -> Iterator[tuple[int, dict[str, Any] | BadExample, int]]:
    """Number, fields and size in bytes of every line or row."""
    if path.name.endswith((".parquet", ".arrow")):
        for number, row in enumerate(_table_rows(path, format), start=1):
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


def _table_rows(path: Path, format: ExampleFormat) -> Iterator[dict[str, Any]]:
    import pyarrow

    is_parquet = path.name.endswith(".parquet")
    read = parquet_pieces if is_parquet else arrow_pieces
    try:
        columns = _columns(path, format, is_parquet)
        for piece in read(path, Columns(",".join(columns)), lambda _: None):
            for batch in piece.batches():
                yield from batch.select(list(columns)).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "Parquet" if is_parquet else "Arrow"
        raise UserError(f"{path}: not readable as {kind} ({str(error).splitlines()[0]})") from None


def _columns(path: Path, format: ExampleFormat, is_parquet: bool) -> tuple[str, ...]:
    """Which columns of a table make its examples. Raises UserError when it has none of them."""
    import pyarrow.parquet

    if is_parquet:
        names = pyarrow.parquet.read_schema(path).names
    else:
        with pyarrow.memory_map(str(path)) as file:
            try:
                names = pyarrow.ipc.open_file(file).schema.names
            except pyarrow.ArrowInvalid:
                names = pyarrow.ipc.open_stream(file).schema.names
    try:
        return format.choose_columns(names)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
