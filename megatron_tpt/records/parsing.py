"""From a JSON line or a table's row to a record. Whatever the data holds, it becomes a record or a BadRecord."""

import datetime
import decimal
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

from megatron_tpt.errors import UserError
from megatron_tpt.records.record import BadRecord, Record, content_id


@dataclass(frozen=True)
class Columns:
    """Which columns of a source make a record."""

    text: str = "text"
    """The column with the document; several, as in "question,answer", are joined by a newline."""
    id: str = "id"
    """The column with the id; without a column "id" the id is made from the content."""
    meta: tuple[str, ...] = ()
    """Further columns to keep in `Record.meta`, under their names, where the source has them."""

    def __post_init__(self) -> None:
        if not all(self.texts):
            raise UserError(f"text column {self.text!r}: give a column name, or several with commas between")

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The columns whose texts make the document."""
        return tuple(name.strip() for name in self.text.split(","))

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """The columns whose values need not be strings."""
        return (self.id, "meta", *self.meta)

    @cached_property
    def used(self) -> tuple[str, ...]:
        """All columns that are looked at."""
        return tuple(dict.fromkeys([*self.texts, "thinking", *self.kept]))


def parse_line(line: bytes, columns: Columns) -> Record | None:
    """Make a record of a line of JSON; None of a blank line. Raises BadRecord."""
    if not line or line.isspace():
        return None
    try:
        fields = orjson.loads(line)
    except ValueError:  # what Python's parser takes and orjson does not: NaN, half surrogate pairs, deep nesting, ...
        fields = _checked(_loads(line), columns)
    else:
        if isinstance(fields, dict) and _rounded([fields.get(name) for name in columns.kept]):
            fields = _loads(line)
    if not isinstance(fields, dict):
        raise BadRecord("not a JSON object")
    return _record(fields, columns)


def parse_row(fields: Mapping[str, Any], columns: Columns) -> Record:
    """Make a record of a table's row, {column: Python value}. Raises BadRecord."""
    values = {name: _json_value(value, name) for name, value in fields.items() if name != "meta"}
    if fields.get("meta") is not None:
        try:
            values["meta"] = _json_value(fields["meta"], "meta")
        except BadRecord:
            if "meta" in columns.meta:
                raise  # it was asked for; otherwise it is a foreign column of that name
    return _record(values, columns)


def _record(fields: Mapping[str, Any], columns: Columns) -> Record:
    try:
        text = "\n".join([fields[name] for name in columns.texts])
    except (KeyError, TypeError):
        raise _no_text(fields, columns) from None
    if not text or text.isspace():
        raise BadRecord("empty text")
    thinking = fields.get("thinking")
    if thinking is not None:
        thinking = _string(fields, "thinking")
        if not thinking or thinking.isspace():
            thinking = None
    meta = _meta(fields.get("meta"))
    if columns.meta:
        meta = meta | {name: fields[name] for name in columns.meta if name in fields}
    id = fields.get(columns.id)
    return Record(id if id and type(id) is str else _id(id, columns.id, text), text, thinking, meta)


def _loads(line: bytes) -> Any:
    """Python's own parser: slower than orjson, and exact for integers of any size."""
    try:
        return json.loads(line.decode("utf-8"))  # json.loads(bytes) would let broken UTF-8 pass
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("not JSON", f"({error})") from None


def _checked(fields: Any, columns: Columns) -> Any:
    """`fields` when what is used of it can be written as UTF-8: "\\ud800" is legal JSON and no character."""
    for name in columns.used if isinstance(fields, dict) else ():
        value = fields.get(name)
        if name == "meta" and name not in columns.meta and not isinstance(value, dict):
            continue  # a foreign column of that name
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRecord(f"column {name!r} holds half a surrogate pair") from None
        except RecursionError:
            raise BadRecord("not JSON", "(nested too deeply)") from None
    return fields


_MAY_BE_ROUNDED = frozenset({float, dict, list})


def _rounded(values: Iterable[Any]) -> bool:
    """Whether `values` may hold an integer beyond 64 bits, of which orjson makes a float."""
    for value in values:
        if type(value) in _MAY_BE_ROUNDED:  # hardly ever: this runs for every record
            if isinstance(value, float):
                if abs(value) >= 2.0**63:
                    return True
            elif _rounded(value.values() if isinstance(value, dict) else value):
                return True
    return False


def _no_text(fields: Mapping[str, Any], columns: Columns) -> BadRecord:
    for name in columns.texts:
        if _string(fields, name) is None:
            return BadRecord("no text", f"in column {name!r} (the columns are {', '.join(fields) or 'none'})")
    raise AssertionError("every column is a string")


def _string(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    raise BadRecord(f"column {name!r} is not a string", f"but {type(value).__name__}")


def _id(value: Any, id_column: str, text: str) -> str:
    if value is None or value == "":
        if id_column != "id":
            raise BadRecord("no id", f"in column {id_column!r}")
        return content_id(text)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise BadRecord("id is neither string nor integer")


def _meta(value: Any) -> dict[str, Any]:
    """`meta` is ours where it is an object (in Parquet we keep it as JSON); a foreign column of that name is left."""
    if isinstance(value, dict):
        return value
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _json_value(value: Any, column: str) -> Any:
    """A table's value as JSON knows it: times as ISO 8601, durations in seconds, decimals as their digits."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json_value(item, column) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item, column) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise BadRecord(f"column {column!r} holds {type(value).__name__}", "which has no form in JSON")
