"""Rows of Parquet, of Arrow files and of streamed data sets: skipped without being converted to Python values.

pyarrow is imported where it is needed, so that the command line's help stays fast.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_tpt.errors import UserError, failure
from megatron_tpt.records.limits import max_record_bytes, too_large
from megatron_tpt.records.parsing import Columns
from megatron_tpt.records.record import BadRecord, DamagedSource
from megatron_tpt.records.table_sizes import bounded, decoded_bytes, long_dictionary_values

if TYPE_CHECKING:
    import pyarrow

_BATCH_BYTES = 16 << 20
_ROWS_PER_BATCH = 1024


type Choose = Callable[[str, "pyarrow.Schema"], list[str]]
"""Which columns to read of a table with that name and schema. Raises UserError for a table that lacks some."""


class Piece(NamedTuple):
    """Some rows that follow each other, read only when `batches` is called."""

    num_rows: int
    batches: "Callable[[], Iterable[pyarrow.RecordBatch | pyarrow.Table]]"


def loaded_piece(batch: "pyarrow.RecordBatch | pyarrow.Table") -> Piece:
    """A piece whose rows are in memory."""
    return Piece(batch.num_rows, lambda: bounded(batch, _BATCH_BYTES))


class TableReader:
    """Takes or skips rows one after another; a damaged file ends with a DamagedSource in place of a row."""

    row_bytes = 0  # the size of a single row is not known

    def __init__(self, name: str, pieces: Iterator[Piece]) -> None:
        self.row = 0
        """Number of the next row, from 0."""
        self._name = name
        self._pieces = pieces
        self._num_left = 0  # rows of the present piece that were neither taken nor skipped
        self._num_owed = 0  # skipped rows of the piece that its batches still hold: they may never have to be read
        self._batches: Iterator[Any] = iter(())
        self._rows: list[dict[str, Any] | BadRecord] = []
        self._position = 0
        self._damage: DamagedSource | None = None

    def share_taken(self) -> float:
        """How much of the rows that were loaded last has been taken."""
        return self._position / len(self._rows) if self._rows else 1.0

    def close(self) -> None:
        """Close the file that the rows come from."""
        for each in (self._batches, self._pieces):
            if isinstance(each, Generator):
                each.close()

    def has_rows(self) -> bool:
        """Whether there is something to take: a row, or the DamagedSource that ends a damaged file."""
        has_row = (self._num_owed == 0 and self._position < len(self._rows)) or self._load()
        return has_row or self._damage is not None

    def skip_to(self, row: int) -> None:
        """Make `row` the next row, or come to the end."""
        while self.row < row:
            if self._num_left == 0 and not self._next_piece():
                self._damage = None
                return
            num_skipped = min(self._num_left, row - self.row)
            self._num_left -= num_skipped
            self._num_owed += num_skipped
            self.row += num_skipped

    def take(self) -> dict[str, Any]:
        """The next row, {column: Python value}. Raises BadRecord, and DamagedSource."""
        if self._damage is not None:
            damage, self._damage = self._damage, None
            raise damage
        fields = self._rows[self._position]
        self._position += 1
        self._num_left -= 1
        self.row += 1
        if isinstance(fields, BadRecord):
            raise fields
        return fields

    def _next_piece(self) -> bool:
        """Go to the next piece that has rows, without opening it."""
        while self._num_left == 0:
            piece = self._next(self._pieces)
            if piece is None:
                return False
            self._num_left, self._num_owed = piece.num_rows, 0
            self._batches, self._rows, self._position = _opened_later(piece), [], 0
        return True

    def _load(self) -> bool:
        """Have the next row in `_rows`."""
        if self._num_left == 0 and not self._next_piece():
            return False
        while (num_loaded := len(self._rows) - self._position) <= self._num_owed:
            self._num_owed -= num_loaded
            batch = self._next(self._batches)
            if batch is None:
                return False
            skipped = min(batch.num_rows, self._num_owed)
            self._num_owed -= skipped
            self._rows, self._position = _python_rows(batch.slice(skipped)), 0
        self._position += self._num_owed
        self._num_owed = 0
        return True

    def _next[T](self, items: Iterator[T]) -> T | None:
        """The next of `items`; None at the end, and where the file is damaged, which ends it."""
        import pyarrow

        try:
            item = next(items, None)
            if item is None and items is self._batches:
                raise DamagedSource("damaged or truncated (it has fewer rows than it says)")
            return item
        except (pyarrow.ArrowException, DamagedSource, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # without number it is pyarrow's: broken data
                raise failure(f"{self._name}: cannot be read ({error.strerror})", error) from error
            text = str(error) if isinstance(error, DamagedSource) else f"damaged or truncated ({_first_line(error)})"
            self._damage = DamagedSource(text)
            self._pieces, self._batches, self._rows = iter(()), iter(()), []
            self._num_left = self._num_owed = self._position = 0
            return None


def _opened_later(piece: Piece) -> "Iterator[pyarrow.RecordBatch | pyarrow.Table]":
    yield from piece.batches()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _python_rows(batch: Any) -> list[dict[str, Any] | BadRecord]:
    if decoded_bytes(batch) <= max_record_bytes():
        try:
            return batch.to_pylist()
        except (ValueError, OverflowError):  # a single value, such as broken UTF-8 or a date beyond Python's
            pass
    return [_python_row_or_problem(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _python_row_or_problem(row: Any) -> dict[str, Any] | BadRecord:
    try:
        return python_row(row)
    except BadRecord as bad:
        return bad


def python_row(row: "pyarrow.RecordBatch | pyarrow.Table") -> dict[str, Any]:
    """The only row of `row`, {column: Python value}. Raises BadRecord where it is too large or has no such form."""
    if (size := decoded_bytes(row)) > max_record_bytes():
        raise too_large(size)
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"({error.reason} at byte {error.start})") from None
    except (ValueError, OverflowError) as error:
        raise BadRecord("value not readable", f"({_first_line(error)})") from None


def record_columns(source_name: str, schema: "pyarrow.Schema", columns: Columns) -> list[str]:
    """The columns of a table that make records. Raises UserError when it lacks a text column or the id column that was
    asked for, or has one of the columns twice."""
    chosen = {name: column_of(name, schema) for name in columns.used}
    needed = columns.texts if columns.id == "id" else (*columns.texts, columns.id)
    for name in needed:
        if chosen[name] is None:
            raise _no_column(source_name, schema, repr(name))
    return _once(source_name, schema, filter(None, chosen.values()))


def row_columns(source_name: str, schema: "pyarrow.Schema", names: Sequence[str] | None) -> list[str]:
    """The columns among `names` that a table has; all of them for None. Raises UserError for a table that has none of
    them, or one of them twice."""
    if names is None:
        return _once(source_name, schema, schema.names)
    chosen = [column for name in names if (column := column_of(name, schema)) is not None]
    if not chosen:
        raise _no_column(source_name, schema, " or ".join(map(repr, names)))
    return _once(source_name, schema, chosen)


def _no_column(source_name: str, schema: "pyarrow.Schema", wanted: str) -> UserError:
    return UserError(f"{source_name}: no column {wanted}; its columns are {', '.join(schema.names) or 'none'}")


def column_of(name: str, schema: "pyarrow.Schema") -> str | None:
    """The column called `name`, or the one with the field at the path `name` ("a.b"); None where there is none."""
    import pyarrow.types

    if name in schema.names:
        return name
    top, *path = name.split(".")
    if not path or top not in schema.names:
        return None
    field = schema.field(schema.names.index(top))
    for step in path:
        if not pyarrow.types.is_struct(field.type) or (place := field.type.get_field_index(step)) < 0:
            return None
        field = field.type.field(place)
    return top


def _once(source_name: str, schema: "pyarrow.Schema", chosen: Iterable[str]) -> list[str]:
    for name in (names := list(dict.fromkeys(chosen))):
        if schema.names.count(name) > 1:
            raise UserError(
                f"{source_name}: has {schema.names.count(name)} columns called {name!r}; rename or remove all but one"
            )
    return names


def num_parquet_rows(path: Path) -> int:
    """Rows of a Parquet file; 1 of one that is damaged, for the row that says so."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except (pyarrow.ArrowException, OSError):
        return 1


def parquet_pieces(path: Path, choose: Choose, report: Callable[[int], None]) -> Iterator[Piece]:
    """The row groups of a Parquet file. `report` is called with about the place in the file where the next rows end, or
    to which they were skipped."""
    import pyarrow.parquet

    # A row group, which pyarrow would read ahead as a whole, may be larger than the memory.
    open_file = partial(
        pyarrow.parquet.ParquetFile, path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
    )
    with open_file() as file:
        names = choose(str(path), file.schema_arrow)
        file_bytes, num_rows = path.stat().st_size, 0
        for i in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(i)
            rows_per_batch = _BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)
            rows_per_batch = max(1, min(rows_per_batch, _ROWS_PER_BATCH))
            place = partial(_report_place, report, file_bytes, max(file.metadata.num_rows, 1))
            batches = partial(_group_batches, open_file, file, i, names, rows_per_batch)
            yield Piece(group.num_rows, partial(_reporting, batches, num_rows, place))
            num_rows += group.num_rows
            place(num_rows)


def _group_batches(
    open_file: "Callable[..., pyarrow.parquet.ParquetFile]",
    file: "pyarrow.parquet.ParquetFile",
    number: int,
    names: list[str],
    rows_per_batch: int,
) -> "Iterator[pyarrow.RecordBatch]":
    """The rows of a row group: fewer at once where one may repeat a long value of a dictionary, since the size of
    the file does not show how often; undecoded where a single row may take many such values."""
    longest, nested = long_dictionary_values(open_file, file, number, names)
    rows_per_batch = max(1, min(rows_per_batch, _BATCH_BYTES // max(longest, 1)))
    if not nested:
        yield from file.iter_batches(rows_per_batch, [number], names)
        return
    with open_file(read_dictionary=nested) as again:
        for batch in again.iter_batches(rows_per_batch, [number], names):
            yield from bounded(batch, _BATCH_BYTES)


def _report_place(report: Callable[[int], None], file_bytes: int, file_rows: int, num_rows: int) -> None:
    report(file_bytes * num_rows // file_rows)


def _reporting(
    batches: "Callable[[], Iterable[pyarrow.RecordBatch]]", num_rows: int, place: Callable[[int], None]
) -> "Iterator[pyarrow.RecordBatch]":
    """`batches`, reporting to `place` how many rows there are up to the end of each."""
    for batch in batches():
        num_rows += batch.num_rows
        place(num_rows)
        yield batch


def arrow_pieces(path: Path, choose: Choose, report: Callable[[int], None]) -> Iterator[Piece]:
    """The record batches of an Arrow file (of either kind), as `datasets` keeps and saves them. `report` is called
    with about the place in the file where the next piece ends."""
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as file:
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        reader = pyarrow.ipc.open_stream(file) if is_stream else pyarrow.ipc.open_file(file)
        names = choose(str(path), reader.schema)
        end = 0
        for batch in reader if is_stream else map(reader.get_batch, range(reader.num_record_batches)):
            batch = batch.select(names)
            batch.validate(full=True)  # offsets of a broken file would lead anywhere in memory
            begin, num_bytes = end, file.tell() - end
            for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
                piece = batch.slice(start, _ROWS_PER_BATCH)
                end = begin + num_bytes * (start + piece.num_rows) // batch.num_rows
                report(end)
                yield loaded_piece(piece)
