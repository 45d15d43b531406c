"""Reading evaluation sets: the text of every item, in whatever columns a benchmark keeps it.

    gsm8k=test.jsonl:question                               a column of text
    mmlu=hf://cais/mmlu/all?split=test:question,choices     a data set of the Hub, with a list
    arc=arc/test.parquet:question,choices.text              a path into an object, or into a list of objects

An item is the text of all its columns: of lists and objects every value, numbers as they are written.
"""

import datetime
import decimal
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_tpt.corpus.options import EvaluationSet
from megatron_tpt.errors import UserError
from megatron_tpt.names import counted
from megatron_tpt.records import describe, expand_sources, read_rows

logger = logging.getLogger(__name__)


def read_items(evaluation_set: EvaluationSet) -> Iterator[tuple[str, str]]:
    """The place ("file:line") and the text of every item, in order; the text of an item without any is empty.

    Raises UserError for what cannot be read (an item that is not read would be missed), for a column that no
    item has, and for a value that is no text.
    """
    missing = dict.fromkeys(evaluation_set.columns)
    names: dict[str, None] = {}
    for source in expand_sources([evaluation_set.location]):
        for row in read_rows(source, _columns_to_read(evaluation_set)):
            if row.value is None:
                hint = f"fix the line; every item of the evaluation set {evaluation_set.name} must be readable"
                raise UserError(describe(source, row, hint))
            place = f"{source.name}:{row.number + 1}"
            texts: list[str] = []
            for column in evaluation_set.columns:
                found = [*_values_at(row.value, column)]
                if found:
                    missing.pop(column, None)
                texts += (text for value in found for text in _texts(value, f"{place}: column {column!r}"))
            names |= dict.fromkeys(row.value) if len(names) < 100 else {}
            yield place, "\n".join(texts)
    if names and missing:
        raise UserError(
            f"{evaluation_set.location}: no item has a column {next(iter(missing))!r}; the columns are "
            f"{', '.join(names)} (give --decontaminate {evaluation_set.name}=FILE:COLUMN)"
        )


def warn_of_empty_items(evaluation_set: EvaluationSet, num_items: int, places: list[str], num_empty: int) -> None:
    """Say that `num_empty` items, the first of them at `places`, have no words. Raises UserError when none has any."""
    if num_items == 0:
        raise UserError(f"{evaluation_set.location}: holds no items of the evaluation set {evaluation_set.name}")
    columns = ", ".join(evaluation_set.columns)
    if num_empty == num_items:
        raise UserError(
            f"{evaluation_set.location}: none of the {num_items:,} items of the evaluation set {evaluation_set.name} "
            f"has a word in {columns}; name other columns with --decontaminate {evaluation_set.name}=FILE:COLUMN"
        )
    if num_empty:
        more = ", ..." if num_empty > len(places) else ""
        logger.warning(
            f"evaluation set {evaluation_set.name}: {num_empty:,} of {counted(num_items, 'item')} without a word in "
            f"{columns}, not searched for ({', '.join(places)}{more})"
        )


def _columns_to_read(evaluation_set: EvaluationSet) -> list[str]:
    """The names of the columns, and of those that paths begin with."""
    return list(dict.fromkeys([*evaluation_set.columns, *(each.partition(".")[0] for each in evaluation_set.columns)]))


def _values_at(fields: Mapping[str, Any], name: str) -> Iterator[Any]:
    """What a row has in the column `name`, or else at that path; of a list of objects, what each of them has."""
    if name in fields:
        yield fields[name]
        return
    step, dot, rest = name.partition(".")
    if not dot or step not in fields:
        return
    for value in fields[step] if isinstance(fields[step], list) else [fields[step]]:
        if isinstance(value, Mapping):
            yield from _values_at(value, rest)


def _texts(value: Any, where: str) -> Iterator[str]:
    """The texts in a value, in order. Raises UserError for what is no text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item, where)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, where)
    elif isinstance(value, int | float | decimal.Decimal):
        if value == value:  # NaN is how some writers of tables have nothing
            yield str(value)
    elif isinstance(value, datetime.date | datetime.time):
        yield value.isoformat()
    elif isinstance(value, bytes):
        try:
            yield value.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{where} holds bytes that are no UTF-8 text; name another column") from None
    elif value is not None:
        raise UserError(f"{where} holds {type(value).__name__}, which is no text; name another column")
