"""Reading any source, in blocks of rows that a job can do, skip and come back to, or record by record."""

import contextlib
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from megatron_tpt.errors import UserError
from megatron_tpt.records.formats import file_format
from megatron_tpt.records.lines import LineReader, read_chunks
from megatron_tpt.records.parsing import Columns, parse_line, parse_row
from megatron_tpt.records.record import BadRecord, DamagedSource, Record
from megatron_tpt.records.sources import Source, expand_sources
from megatron_tpt.records.tables import (
    Choose,
    Piece,
    TableReader,
    arrow_pieces,
    num_parquet_rows,
    parquet_pieces,
    record_columns,
)

OnBadRecord = Literal["stop", "skip"]
DAMAGED = "damaged file"
"""The problem of the last row of a source that cannot be read any further."""


SKIP_ADVICE = "fix the line or skip such records with --on-bad-record skip"
"""What to do about a bad record, in tools with that option."""


class Row(NamedTuple):
    """A line or row of a source: a record, or the reason why it is none."""

    number: int
    """Place in the source, from 0; blank lines count."""
    record: Record | None
    problem: str | None = None
    """Why there is no record: short, and the same for all rows of its kind."""
    detail: str = ""
    """What more can be said of the problem."""
    num_bytes: int = 0
    """Size of the line (unpacked); 0 in tables."""


@dataclass
class ReadProgress:
    """How far `read_blocks` is in its source."""

    _begin: int = 0
    _end: int = 0
    _share: Callable[[], float] = lambda: 1.0
    """How much of the bytes from `_begin` to `_end`, which are loaded, was taken."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the file that were taken or skipped (of packed files and tables, about); to be compared with
        `Source.num_bytes`."""
        return self._begin + round((self._end - self._begin) * self._share())

    def report(self, end: int) -> None:
        """Take note that the file is loaded up to `end`."""
        self._begin, self._end = self._end, end

    def follow(self, share: Callable[[], float]) -> None:
        """Ask `share` how much of what was loaded last has been taken."""
        self._share = share


@dataclass
class ReadCounts:
    """What `read_records` has done so far; filled while it reads."""

    read: int = 0
    """Good records handed out."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Bad records skipped, by reason."""


def read_blocks(
    source: Source,
    columns: Columns,
    rows_per_block: int,
    wanted: Callable[[int], bool],
    progress: ReadProgress | None = None,
) -> Iterator[tuple[int, Iterator[Row]]]:
    """Yield (k, rows) for every block k of a source with `wanted(k)`: rows k * rows_per_block and on, lazily.

    `wanted` is asked for each block once, in order, just before it. Rows of other blocks are skipped unparsed, so
    that resuming where a job stopped costs little. Blocks are counted in physical rows: they are the same whichever
    rows are good. Blank lines make no row. Rows that were not taken when the next block is asked for are gone.

    Bad data never raises: it is a row with a `problem`. Where a file is truncated or broken, the last row has the
    problem DAMAGED (it is omitted when its block is not wanted; of a broken Parquet file later row groups are then
    still read). Raises UserError for a source that cannot be opened or has no text column, and Fault where the storage
    or the network fails.
    """
    reader, parse = _open(source, columns, progress or ReadProgress())
    with contextlib.closing(reader):
        for block in itertools.count():
            end = (block + 1) * rows_per_block
            if wanted(block):
                if not reader.has_rows():
                    return
                rows = _rows(reader, parse, columns, end)
                yield block, rows
                rows.close()
            try:
                reader.skip_to(end)
            except DamagedSource:
                return
            if reader.row < end:
                return


def can_start_inside(source: Source) -> bool:
    """Whether `read_between` reads this source: plain lines, and Parquet."""
    format = file_format(source.path) if source.path else None
    return format is not None and (format.has_plain_lines or format.kind == "parquet")


def read_between(source: Source, columns: Columns, begin: int, end: int) -> Iterator[Row]:
    """The rows that begin in bytes `begin` to `end` of a file that `can_start_inside`, so that stretches side by side
    have each row once. The rows of Parquet count as equally long. In other files rows are numbered from `begin` on.

    Bad data and errors are as in `read_blocks`.
    """
    assert source.path is not None and source.num_bytes is not None
    if _is_parquet(source.path):
        reader, parse = _open(source, columns, ReadProgress())
        first, last = (-(-place * num_parquet_rows(source.path) // source.num_bytes) for place in (begin, end))
        reader.skip_to(first)
        yield from _rows(reader, parse, columns, last)
        return
    lines = LineReader(read_chunks(source.path, lambda _: None, max(begin - 1, 0)))
    if begin:  # past the end of the line before, of which a newline just before `begin` is all
        with contextlib.suppress(BadRecord):
            lines.take()
        begin += lines.row_bytes
    while begin < end and lines.has_rows():
        yield from _rows(lines, parse_line, columns, lines.row + 1)
        begin += lines.row_bytes + 1


def _is_parquet(path: Path) -> bool:
    format = file_format(path)
    return format is not None and format.kind == "parquet"


type _Parse = Callable[[Any, Columns], Record | None]


class Reader(Protocol):
    """Takes or skips rows one after another."""

    row: int
    """Number of the next row, from 0."""
    row_bytes: int
    """Size of the line that was taken last; 0 in tables."""

    def has_rows(self) -> bool:
        """Whether there is something to take."""

    def skip_to(self, row: int) -> None:
        """Make `row` the next row, or come to the end."""

    def take(self) -> Any:
        """The next line (bytes) or row ({column: value}). Raises BadRecord, and DamagedSource."""

    def close(self) -> None:
        """Close the file. (It would stay open until garbage is collected: reader and progress know each other.)"""


def _open(source: Source, columns: Columns, progress: ReadProgress) -> tuple[Reader, _Parse]:
    """The rows of a source and what makes records of them (None of a blank line)."""
    reader, is_table = open_rows(source, functools.partial(_record_columns, columns), progress)
    return reader, parse_row if is_table else parse_line


def _record_columns(columns: Columns, source_name: str, schema: Any) -> list[str]:
    return record_columns(source_name, schema, columns)


def open_rows(source: Source, choose: Choose, progress: ReadProgress) -> tuple[Reader, bool]:
    """The rows of a source, and whether they are rows of a table: `choose` names the columns to read of it."""
    format = file_format(source.path) if source.path else None
    if source.path is not None and (format is None or not format.is_table):
        lines = LineReader(read_chunks(source.path, progress.report))
        progress.follow(lines.share_taken)
        return lines, False
    table = TableReader(source.name, table_pieces(source, choose, progress.report))
    progress.follow(table.share_taken)
    return table, True


def table_pieces(source: Source, choose: Choose, report: Callable[[int], None]) -> Iterator[Piece]:
    """The pieces of a table (see `parquet_pieces`), or of a shard of a data set on the Hub."""
    if source.dataset is not None:
        return source.dataset.pieces(source.name, source.shard, choose)
    if source.path is None:
        raise ValueError(f"{source.name}: neither file nor data set")
    return (parquet_pieces if _is_parquet(source.path) else arrow_pieces)(source.path, choose, report)


def _rows(reader: Reader, parse: _Parse, columns: Columns, end: int) -> Generator[Row]:
    """The rows from where `reader` is to row number `end`."""
    while reader.row < end:
        number = reader.row
        try:
            if not reader.has_rows():
                return
            record = parse(reader.take(), columns)
        except BadRecord as bad:
            yield Row(number, None, bad.problem, bad.detail, reader.row_bytes)
        except DamagedSource as damage:
            yield Row(number, None, DAMAGED, str(damage))
        else:
            if record is not None:
                yield Row(number, record, None, "", reader.row_bytes)


def read_records(
    paths: Sequence[str | Path],
    *,
    text_column: str = "text",
    id_column: str = "id",
    meta_columns: Sequence[str] = (),
    on_bad_record: OnBadRecord = "stop",
    limit: int | None = None,
    counts: ReadCounts | None = None,
    advice: str = SKIP_ADVICE,
) -> Iterator[Record]:
    """Read records one by one from all `paths` (see `expand_sources`), in order. Memory does not grow with the input.

    The columns are those of `Columns`. `thinking` and `meta` are taken where present; other columns are not
    read. Blank lines are skipped. At most `limit` records are handed out.

    A bad record (no JSON object, no text, a text that is blank, no string or no Unicode) raises UserError naming
    "file:line" (in tables: the row, from 1) and ending with `advice`, or is skipped and counted with
    `on_bad_record="skip"`. A file that is damaged as a whole always raises.
    """
    counts = ReadCounts() if counts is None else counts
    columns = Columns(text_column, id_column, tuple(meta_columns))
    for source in expand_sources(paths):
        for _, rows in read_blocks(source, columns, sys.maxsize, lambda _: True):
            for row in rows:
                if limit is not None and counts.read >= limit:
                    return
                if row.record is not None:
                    counts.read += 1
                    yield row.record
                elif on_bad_record == "stop" or row.problem == DAMAGED:
                    raise UserError(describe(source, row, advice))
                else:
                    counts.skipped[str(row.problem)] += 1


class Problem(Protocol):
    """What `describe` needs of a row that is bad."""

    @property
    def number(self) -> int: ...
    @property
    def problem(self) -> str | None: ...
    @property
    def detail(self) -> str: ...


def describe(source: Source, row: Problem, hint: str = SKIP_ADVICE) -> str:
    """One line for the user about a row that is bad: its place, what is wrong, what can be done (`hint`)."""
    if row.problem == DAMAGED:
        return f"{source.name}: {row.detail}; make or fetch the file again"
    return f"{source.name}:{row.number + 1}: {f'{row.problem} {row.detail}'.rstrip()}; {hint}"
