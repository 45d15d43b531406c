"""From rows to the pieces of text that are tokenized: by columns where rows are plain, else record by record.

Arrow parses JSON and joins columns many times faster than Python can, and releases the interpreter lock. It takes a
little that JSON forbids and refuses a little that Python's parser takes; whatever could be of that kind, and whatever
is bad, goes record by record through `megatron_tpt.records`, which decides. Both ways make the same pieces.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy
import orjson
import pyarrow
import pyarrow.compute
import pyarrow.json

from megatron_tpt import json_data
from megatron_tpt.indexing.arrow_texts import WHITESPACE, is_blank, is_null
from megatron_tpt.indexing.join import NO_THINKING, Join, pieces
from megatron_tpt.indexing.selection import NOT_SELECTED, Selection, num_not_selected
from megatron_tpt.records import Columns, OnBadRecord, Record, Row
from megatron_tpt.records.limits import max_record_bytes, too_large
from megatron_tpt.records.parsing import parse_line, parse_row
from megatron_tpt.records.record import BadRecord
from megatron_tpt.records.table_sizes import decoded_bytes
from megatron_tpt.records.tables import python_row

THINKING, OPEN, CLOSE, SEQUENCE_END, DOCUMENT_END = (1 << bit for bit in range(5))
"""Of a piece: it is thinking; the think tag opens before it; closes after it; it ends a sequence; a document."""

_SMALLEST_FAST_BYTES = 1 << 14
_SCAN_BYTES = 1 << 17  # of a processor's cache
_TEXT = pyarrow.large_string()
_NO_ROWS = pyarrow.table({})
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{\n"))


@dataclass(frozen=True)
class TooLarge:
    """A line that exceeds the limit, of which only the size is left."""

    num_bytes: int


type Rows = bytes | pyarrow.RecordBatch | TooLarge
"""Whole lines, or rows of a table."""
Flags = numpy.ndarray[tuple[int], numpy.dtype[numpy.uint8]]


@dataclass
class Pieces:
    """The pieces of some rows in order, [num_pieces], and the results of the rows."""

    texts: pyarrow.LargeStringArray
    flags: Flags
    num_rows: int
    """Rows read; blank lines count."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Bad records skipped, by reason."""
    problem: Row | None = None
    """The bad record that stops the run; its number counts from the first of these rows."""

    @property
    def document_numbers(self) -> numpy.ndarray:
        """Which document each piece belongs to, [num_pieces]."""
        ends = (self.flags & DOCUMENT_END) > 0
        return numpy.cumsum(ends) - ends


@dataclass(frozen=True)
class PieceMaker:
    """Makes pieces of rows, by the settings of a job."""

    columns: Columns
    join: Join
    on_bad_record: OnBadRecord
    split_sentences: Callable[[str], list[str]] | None = None
    """With it, each sentence is a sequence of its own."""
    selection: Selection = field(default_factory=Selection)
    """Which records make documents; the others are counted as skipped."""

    def make(self, rows: Rows) -> Iterator[tuple[Rows, Pieces]]:
        """Whole lines or a table's rows, in one portion or several, and their pieces."""
        fast = self._fast(rows)
        if fast is not None:
            yield rows, fast
        elif isinstance(rows, TooLarge) or _num_bytes(rows) <= _SMALLEST_FAST_BYTES or not self._may_be_fast():
            yield rows, self.make_slowly(rows)
        else:  # what is bad spoils only a small part
            for half in _halves(rows):
                yield from self.make(half)

    def make_slowly(self, rows: Rows) -> Pieces:
        """The same, record by record: exact about what is wrong."""
        texts: list[str] = []
        flags: list[int] = []
        skipped: Counter[str] = Counter()
        number = -1
        for number, parse in enumerate(self._rows(rows)):
            try:
                record = parse()
                if record is None:
                    continue
                if self.selection.takes(record.meta):
                    self._add_record(record, texts, flags)
                else:
                    skipped[NOT_SELECTED] += 1
            except BadRecord as bad:
                if self.on_bad_record == "stop":
                    problem = Row(number, None, bad.problem, bad.detail)
                    return Pieces(_text_array(texts), numpy.array(flags, numpy.uint8), number, skipped, problem)
                skipped[bad.problem] += 1
        return Pieces(_text_array(texts), numpy.array(flags, numpy.uint8), number + 1, skipped)

    def row_number(self, rows: Rows, document: int) -> int:
        """Which row a document came from, when no row was skipped."""
        for number, parse in enumerate(self._rows(rows)):
            record = parse()
            document -= record is not None and self.selection.takes(record.meta)
            if document < 0:
                return number
        raise AssertionError("there are fewer documents")

    def _rows(self, rows: Rows) -> Iterator[Callable[[], Record | None]]:
        if isinstance(rows, TooLarge):
            yield partial(self._refuse, rows.num_bytes)
            return
        if not isinstance(rows, bytes):
            for i in range(rows.num_rows):
                yield partial(self._parse_row, rows, i)
            return
        for line in rows.removesuffix(b"\n").split(b"\n"):
            yield partial(self._parse_line, line)

    def _parse_row(self, rows: pyarrow.RecordBatch, number: int) -> Record:
        return parse_row(python_row(rows.slice(number, 1)), self.columns)

    def _refuse(self, num_bytes: int) -> Record:
        raise too_large(num_bytes)

    def _parse_line(self, line: bytes) -> Record | None:
        if len(line) > max_record_bytes():
            raise too_large(len(line))
        line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write first
        return parse_line(line, self.columns) if line and not line.isspace() else None

    def _add_record(self, record: Record, texts: list[str], flags: list[int]) -> None:
        sample = list(pieces(record, self.join))
        for text, is_thinking in sample:
            kind = THINKING * is_thinking
            parts = self.split_sentences(text) if self.split_sentences else [text]
            texts += parts
            first = len(flags)
            flags += [kind | SEQUENCE_END * (self.split_sentences is not None)] * len(parts)
            flags[first] |= OPEN * is_thinking
            flags[-1] |= CLOSE * is_thinking
        flags[-1] |= SEQUENCE_END | DOCUMENT_END

    def _may_be_fast(self) -> bool:
        has_paths = any("." in name for name in self.columns.texts)
        return self.join is not Join.interleaved and self.split_sentences is None and not has_paths

    def _fast(self, rows: Rows) -> Pieces | None:
        """The pieces, or None where a record needs a closer look."""
        if not self._may_be_fast() or isinstance(rows, TooLarge):
            return None
        if (len(rows) if isinstance(rows, bytes) else decoded_bytes(rows)) > max_record_bytes():
            return None
        try:
            rows, unselected = self.selection.apply(rows)
            if isinstance(rows, bytes):
                is_left = rows or not unselected
                num_rows, table = _json_table(rows, self.columns) if is_left else (0, _NO_ROWS)
            else:
                num_rows, table = rows.num_rows, rows
                _check_meta(table)
            if not num_rows:
                return Pieces(_text_array([]), numpy.zeros(0, numpy.uint8), unselected, num_not_selected(unselected))
            texts, thinking = _text_and_thinking(table, self.columns)
        except (_NeedsCloserLookError, BadRecord, orjson.JSONDecodeError, pyarrow.ArrowException):
            return None
        is_bad, skipped = self._bad_rows(texts, thinking)
        if skipped:
            if self.on_bad_record == "stop":
                return None
            is_good = pyarrow.array(~is_bad)
            texts, thinking = texts.filter(is_good), thinking.filter(is_good)
        skipped += num_not_selected(unselected)
        return Pieces(*_joined(texts, thinking, self.join), num_rows + unselected, skipped)

    def _bad_rows(self, texts: Any, thinking: Any) -> tuple[numpy.ndarray, Counter[str]]:
        are_null, are_blank = is_null(texts), is_blank(texts)
        lack_thinking = is_null(thinking) & (self.join is Join.thinking_only)
        counts = Counter(
            {
                "no text": int(are_null.sum()),
                "empty text": int((are_blank & ~are_null).sum()),
                NO_THINKING: int((lack_thinking & ~are_null & ~are_blank).sum()),
            }
        )
        return are_null | are_blank | lack_thinking, +counts


class _NeedsCloserLookError(Exception):
    pass


def _num_bytes(rows: bytes | pyarrow.RecordBatch) -> int:
    """Size of several rows; 0 of a single one, of which there are no halves."""
    if isinstance(rows, bytes):
        return len(rows) if rows.find(b"\n") + 1 not in (0, len(rows)) else 0
    return rows.nbytes if rows.num_rows > 1 else 0


def _halves(rows: bytes | pyarrow.RecordBatch) -> Iterator[Any]:
    if isinstance(rows, bytes):
        middle = rows.find(b"\n", len(rows) // 2) + 1
        middle = middle if 0 < middle < len(rows) else rows.rfind(b"\n", 0, len(rows) // 2) + 1
        halves = (rows[:middle], rows[middle:])
    else:
        middle = rows.num_rows // 2
        halves = (rows.slice(0, middle), rows.slice(middle))
    return (half for half in halves if len(half))


def _text_array(texts: list[str]) -> pyarrow.LargeStringArray:
    return pyarrow.array(texts, type=_TEXT)


def _json_table(lines: bytes, columns: Columns) -> tuple[int, pyarrow.Table]:
    """(number of lines, the used columns) of lines of which each is one JSON object or empty."""
    num_lines, num_objects = _check_lines(lines)
    first = orjson.loads(lines[: lines.find(b"\n") % (len(lines) + 1)].strip() or b"{}")
    names = dict.fromkeys([*columns.texts, "thinking"])
    fields = [(name, pyarrow.string()) for name in names]
    if columns.id not in names:
        has_integer_id = isinstance(first, dict) and type(first.get(columns.id)) is int
        fields.append((columns.id, pyarrow.int64() if has_integer_id else pyarrow.string()))
    table = pyarrow.json.read_json(
        pyarrow.BufferReader(lines),
        parse_options=pyarrow.json.ParseOptions(
            explicit_schema=pyarrow.schema(fields), unexpected_field_behavior="ignore"
        ),
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
    )
    if table.num_rows != num_objects:
        raise _NeedsCloserLookError
    _check_nesting(lines)
    return num_lines, table


def _check_nesting(lines: bytes) -> None:
    """Lines may not be nested more deeply than other readers take: these parse the fields that are skipped here."""
    brackets = lines.translate(None, _NO_BRACKETS)
    if len(brackets) <= json_data.MAX_NESTING:
        return
    doubtful = [number for number, line in enumerate(brackets.split(b"\n")) if len(line) > json_data.MAX_NESTING]
    if doubtful:
        split = lines.split(b"\n")
        if any(json_data.is_deep(orjson.loads(split[number])) for number in doubtful):
            raise _NeedsCloserLookError


def _check_meta(table: Any) -> None:
    """The same for JSON in a table's column `meta`."""
    if "meta" in table.schema.names and any(is_kind(table.column("meta").type) for is_kind in _STRING_KINDS[:2]):
        counts = [pyarrow.compute.count_substring(table.column("meta"), bracket) for bracket in "[{"]
        most = pyarrow.compute.max(pyarrow.compute.add(*counts)).as_py()
        if most is not None and most > json_data.MAX_NESTING:
            raise _NeedsCloserLookError


def _check_lines(lines: bytes) -> tuple[int, int]:
    """(lines, lines that are not empty). Each of these must begin and end as an object does, and be UTF-8.

    Then a newline can only be between objects, and with as many objects as lines there is one on each.
    """
    if len(lines) > 0x7FFF_FFFF:
        raise _NeedsCloserLookError
    offsets = numpy.array([0, len(lines)], numpy.int32)
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(lines)])
    text.validate(full=True)
    data = numpy.frombuffer(lines, numpy.uint8)
    if (num_lines := _count_plain_lines(data)) is not None:
        return num_lines, num_lines
    ends = numpy.flatnonzero(data == ord("\n"))
    if not lines.endswith(b"\n"):
        ends = numpy.append(ends, len(lines))
    begins = numpy.concatenate([[0], ends[:-1] + 1])
    is_full = ends > begins
    lasts = ends[is_full] - 1
    lasts -= data[lasts] == ord("\r")
    if not ((data[begins[is_full]] == ord("{")).all() and (data[lasts] == ord("}")).all()):
        raise _NeedsCloserLookError
    return len(ends), len(lasts)


def _count_plain_lines(data: numpy.ndarray) -> int | None:
    """The number of lines when every one is {...} and a newline, with nothing around it; None for all else."""
    if len(data) < 3 or data[0] != ord("{") or data[-2] != ord("}") or data[-1] != ord("\n"):
        return None
    num_lines = 1
    for start in range(1, len(data) - 2, _SCAN_BYTES):
        end = min(start + _SCAN_BYTES, len(data) - 2)
        is_newline = data[start:end] == ord("\n")
        parts_objects = (data[start - 1 : end - 1] == ord("}")) & (data[start + 1 : end + 1] == ord("{"))
        if (is_newline > parts_objects).any():
            return None
        num_lines += int(numpy.count_nonzero(is_newline))
    return num_lines


def _text_and_thinking(table: Any, columns: Columns) -> tuple[Any, Any]:
    """The documents, null where there is none, and the thinking, null where there is none or it is blank."""
    names = table.schema.names
    texts = [_strings(table, name) for name in columns.texts]
    text = texts[0]
    if len(texts) > 1:
        text = pyarrow.compute.binary_join_element_wise(*texts, pyarrow.scalar("\n", _TEXT))
    _check_ids(table, columns)
    if "thinking" not in names or table.column("thinking").null_count == table.num_rows:
        return text, pyarrow.nulls(len(text), _TEXT)
    thinking = _strings(table, "thinking")
    thinking = pyarrow.compute.utf8_trim(thinking, characters=WHITESPACE)
    is_empty = pyarrow.compute.equal(pyarrow.compute.binary_length(thinking), 0)
    return text, pyarrow.compute.if_else(is_empty, pyarrow.scalar(None, _TEXT), thinking)


def _check_ids(table: Any, columns: Columns) -> None:
    if columns.id not in table.schema.names:
        if columns.id != "id":
            raise _NeedsCloserLookError
        return
    ids = table.column(columns.id)
    if pyarrow.types.is_integer(ids.type) or pyarrow.types.is_null(ids.type):
        has_empty = False
    else:
        ids = _strings(table, columns.id)
        has_empty = bool(pyarrow.compute.any(pyarrow.compute.equal(ids, "")).as_py())
    if columns.id != "id" and (ids.null_count or has_empty):
        raise _NeedsCloserLookError


def _strings(table: Any, name: str) -> pyarrow.LargeStringArray:
    """A column of valid UTF-8 strings in one array."""
    if name not in table.schema.names:
        raise _NeedsCloserLookError
    column = table.column(name)
    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if not any(is_of_kind(kind) for is_of_kind in _STRING_KINDS):
        raise _NeedsCloserLookError
    column = column.cast(_TEXT)
    if isinstance(column, pyarrow.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    column.validate(full=True)
    return column


_STRING_KINDS = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)


def _joined(texts: Any, thinking: Any, join: Join) -> tuple[pyarrow.LargeStringArray, Flags]:
    """The pieces of documents whose records are good, and their flags."""
    has_thinking = ~is_null(thinking) & (join is not Join.document_only)
    if not has_thinking.any():
        return texts, numpy.full(len(texts), SEQUENCE_END | DOCUMENT_END, numpy.uint8)
    newline, nothing = pyarrow.scalar("\n", _TEXT), pyarrow.scalar("", _TEXT)
    thinking = thinking.filter(pyarrow.array(has_thinking))
    thinking = pyarrow.compute.binary_join_element_wise(nothing, thinking, nothing, newline)
    tagged = THINKING | OPEN | CLOSE
    if join is Join.thinking_only:
        return thinking, numpy.full(len(thinking), tagged | SEQUENCE_END | DOCUMENT_END, numpy.uint8)
    num_pieces = 1 + has_thinking.astype(numpy.int64)
    lasts = numpy.cumsum(num_pieces) - 1
    firsts = lasts - has_thinking
    text_places, thinking_places = (firsts, lasts) if join is Join.document_thinking else (lasts, firsts)
    order = numpy.empty(int(num_pieces.sum()), numpy.int64)
    order[thinking_places[has_thinking]] = len(texts) + numpy.arange(len(thinking))
    order[text_places] = numpy.arange(len(texts))
    flags = numpy.where(order >= len(texts), tagged, 0).astype(numpy.uint8)
    flags[lasts] |= SEQUENCE_END | DOCUMENT_END
    return pyarrow.concat_arrays([texts, thinking]).take(pyarrow.array(order)), flags
