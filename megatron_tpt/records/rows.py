"""Rows of any source as plain dictionaries, for tools that need other fields than those of a record."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

from megatron_tpt.errors import UserError
from megatron_tpt.names import shown
from megatron_tpt.records.folders import listed
from megatron_tpt.records.parsing import Columns, parse_object
from megatron_tpt.records.reading import DAMAGED, ReadProgress, open_rows
from megatron_tpt.records.record import BadRecord, DamagedSource
from megatron_tpt.records.sources import Source
from megatron_tpt.records.tables import row_columns


class RawRow(NamedTuple):
    """A line or row of a source as it is, or the reason why it cannot be read."""

    number: int
    """Place in the source, from 0; blank lines count. `describe(source, row)` makes "file:line: ..." of it."""
    value: dict[str, Any] | None
    """The fields: JSON values of a line, Python values of a table's row (times, bytes, ... too)."""
    problem: str | None = None
    """Why there is no value: short, and the same for all rows of its kind. DAMAGED: the source ends here, early."""
    detail: str = ""
    """What more can be said of the problem."""


type ChooseFields = Callable[[Sequence[str]], Sequence[str]]
"""Which columns of a table to read, given the names of all. Raises UserError for a table that lacks what is needed."""


def read_rows(source: Source, columns: Sequence[str] | ChooseFields | None = None) -> Iterator[RawRow]:
    """All lines or rows of a source, in order; blank lines make none. Memory does not grow with the source.

    `columns` names the fields that the caller reads, or paths to them ("a.b" needs the column "a"), or is a function
    that chooses them: of tables, only these columns are read. Fields that a row lacks are missing in its value. Without
    `columns` all are read.

    Bad data never raises: it is a row with a `problem`; where a file is broken or truncated, the last row has the
    problem DAMAGED. Raises UserError for a source that cannot be opened or has one of the columns twice, and Fault
    where the storage or the network fails.
    """
    reader, is_table = open_rows(source, partial(_chosen, columns), ReadProgress())
    named = None if callable(columns) else columns
    with closing(reader):
        while True:
            number = reader.row
            try:
                if not reader.has_rows():
                    return
                taken = reader.take()
                value = taken if is_table else parse_object(taken, named)
            except BadRecord as bad:
                yield RawRow(number, None, bad.problem, bad.detail)
            except DamagedSource as damage:
                yield RawRow(number, None, DAMAGED, str(damage))
            else:
                if value is not None:
                    yield RawRow(number, value)


def notes_of_columns_not_kept(sources: Sequence[Source], columns: Columns) -> list[str]:
    """A line that names what records with these columns lack, judged by the first row of each source; no line
    where they lack nothing."""
    kept = {each for name in columns.used for each in (name, name.partition(".")[0])}
    others: dict[str, str] = {}
    for source in sources:
        if source.shard == 0:  # all shards of a data set have the same columns
            for name in _column_names(source):
                if name not in kept:
                    others.setdefault(name, source.name)
    if not others:
        return []
    where = f"first seen in {shown(next(iter(others.values())))}"
    return [f"not kept: {listed([*others])} ({where}); --meta-columns keeps columns in meta"]


def _column_names(source: Source) -> list[str]:
    """The columns of a table, or the fields of a file's first line; none where that cannot be read."""
    names: list[str] = []

    def one_of(found: Sequence[str]) -> list[str]:
        names.extend(found)
        return [name for name in found if found.count(name) == 1][:1]

    row = next(read_rows(source, one_of), None)
    return names or [*(row.value or ())] if row else names


def _chosen(columns: Sequence[str] | ChooseFields | None, source_name: str, schema: Any) -> list[str]:
    if not callable(columns):
        return row_columns(source_name, schema, columns)
    try:
        chosen = columns(schema.names)
    except UserError as error:
        raise UserError(f"{source_name}: {error}") from None
    return row_columns(source_name, schema, chosen)
