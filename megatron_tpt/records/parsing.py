"""From a JSON line or a table's row to a record. Whatever the data holds, it becomes a record or a BadRecord."""

import datetime
import decimal
import json
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

from megatron_tpt import json_data
from megatron_tpt.errors import UserError
from megatron_tpt.records.record import BadRecord, Record, content_id

type Compose = Callable[[Mapping[str, Any], Sequence[str]], tuple[str, dict[str, Any]]]
"""(fields of a row, names of the text columns) -> (text, fields of `meta`)."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a source make a record."""

    text: str = "text"
    """The column with the document; several, as in "question,answer", are joined by a newline. "a.b" is the field b of
    the objects in column a, where no column has the name "a.b"."""
    id: str = "id"
    """The column with the id; without a column "id" the id is made from the content."""
    meta: tuple[str, ...] = ()
    """Further columns to keep in `Record.meta`, under their names, where the source has them."""
    compose: Compose | None = None
    """Makes the text from the text columns, which may then be of any type, and what it adds to `meta`; raises
    BadRecord. Without, they are texts, and are joined by a newline."""
    extra: tuple[str, ...] = ()
    """Further columns that `compose` looks at, where the source has them."""

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
        return (self.id, "meta", *self.meta, *(self.texts if self.compose else ()), *self.extra)

    @cached_property
    def holding_text(self) -> frozenset[str]:
        """The columns in which bytes are text, as some writers of tables have it."""
        names = (*self.texts, "thinking", self.id)
        return frozenset([*names, *(name.partition(".")[0] for name in names)])

    @cached_property
    def used(self) -> tuple[str, ...]:
        """All columns that are read."""
        return tuple(dict.fromkeys([*self.texts, "thinking", *self.kept]))


def parse_line(line: bytes, columns: Columns) -> Record | None:
    """Make a record of a line of JSON; None of a blank line. Raises BadRecord."""
    if not line or line.isspace():
        return None
    fields, is_exact = _parsed(line)
    if is_exact:
        fields = _checked(fields, columns)
    elif isinstance(fields, dict) and _rounded([field_at(fields, name) for name in columns.kept]):
        fields = _loads(line)
    if not isinstance(fields, dict):
        raise NotAnObject(fields)
    return _record(fields, columns)


def parse_object(line: bytes, names: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The object in a line of JSON, exactly; None of a blank line. Raises BadRecord, also where a field among `names`
    (None: any) holds half a surrogate pair."""
    if not line or line.isspace():
        return None
    fields, is_exact = _parsed(line)
    if isinstance(fields, dict):
        if is_exact:
            _require_unicode(fields, names)
        elif _rounded(fields.values()):
            fields = _loads(line)
    if not isinstance(fields, dict):
        raise NotAnObject(fields)
    return fields


class NotAnObject(BadRecord):
    """JSON, but a list, a string, ..."""

    def __init__(self, value: Any) -> None:
        super().__init__("not a JSON object", f"but {kind_of(value)}")


def field_at(fields: Mapping[str, Any], name: str) -> Any:
    """The field `name` of a row, or what is at the path `name` ("a.b") where no field has that name; None where there
    is none."""
    if name in fields or "." not in name:
        return fields.get(name)
    value: Any = fields
    for step in name.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def parse_row(fields: Mapping[str, Any], columns: Columns) -> Record:
    """Make a record of a table's row, {column: Python value}. Raises BadRecord."""
    values = {
        name: _json_value(value, name, name in columns.holding_text) for name, value in fields.items() if name != "meta"
    }
    if fields.get("meta") is not None:
        try:
            values["meta"] = _json_value(fields["meta"], "meta")
        except BadRecord:
            if "meta" in columns.meta:
                raise  # it was asked for; otherwise it is a foreign column of that name
    return _record(values, columns)


def _record(fields: Mapping[str, Any], columns: Columns) -> Record:
    composed: dict[str, Any] = {}
    if columns.compose is not None:
        text, composed = columns.compose(fields, columns.texts)
    else:
        text = _joined_text(fields, columns)
    if not text or text.isspace():
        raise BadRecord("empty text")
    is_part_of_text = columns.compose is not None and "thinking" in columns.texts
    thinking = None if is_part_of_text else fields.get("thinking")
    if thinking is not None:
        thinking = _string(fields, "thinking")
        if not thinking or thinking.isspace():
            thinking = None
    meta = _meta(fields.get("meta"))
    if columns.meta:
        found = {name: field_at(fields, name) for name in columns.meta}
        meta = meta | {name: value for name, value in found.items() if value is not None or name in fields}
    meta = meta | composed if composed else meta
    id = field_at(fields, columns.id)
    return Record(id if id and type(id) is str else _id(id, columns.id, text), text, thinking, meta)


def _joined_text(fields: Mapping[str, Any], columns: Columns) -> str:
    try:
        return "\n".join([fields[name] for name in columns.texts])
    except (KeyError, TypeError):
        return "\n".join([_text(fields, name) for name in columns.texts])


def _parsed(line: bytes) -> tuple[Any, bool]:
    """What a line holds, and whether Python's parser read it, for which orjson is too strict. Raises BadRecord."""
    try:
        fields = orjson.loads(line)
    except ValueError:  # what Python's parser takes and orjson does not: NaN, half surrogate pairs, ...
        return _loads(line), True
    if json_data.may_be_deep(line) and json_data.is_deep(fields):
        raise _TooDeep
    return fields, False


def _loads(line: bytes) -> Any:
    """Python's own parser: slower than orjson, and exact for integers of any size."""
    try:
        return json_data.loads(line.decode("utf-8"))  # json.loads(bytes) would let broken UTF-8 pass
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"({error.reason} at byte {error.start})") from None
    except json_data.TooDeep:
        raise _TooDeep from None
    except json.JSONDecodeError as error:
        raise BadRecord("not JSON", f"({error})") from None
    except ValueError:  # where others would stop: it takes quadratic time
        raise BadRecord("integer too large", f"(over {sys.get_int_max_str_digits():,} digits)") from None


class _TooDeep(BadRecord):
    def __init__(self) -> None:
        super().__init__("nested too deeply", f"({json_data.TooDeep()})")


def _checked(fields: Any, columns: Columns) -> Any:
    """`fields` when what is used of it can be written as UTF-8: "\\ud800" is legal JSON and no character."""
    if isinstance(fields, dict):
        is_foreign = "meta" not in columns.meta and not isinstance(fields.get("meta"), dict)
        _require_unicode(fields, [name for name in columns.used if name != "meta" or not is_foreign])
    return fields


def _require_unicode(fields: Mapping[str, Any], names: Sequence[str] | None) -> None:
    """Raise BadRecord when a field among `names` (None: any) holds half a surrogate pair, which is no character."""
    for name in fields if names is None else names:
        try:
            json.dumps(field_at(fields, name), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRecord(f"column {name!r} holds half a surrogate pair") from None


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


def _text(fields: Mapping[str, Any], name: str) -> str:
    """A string that makes (part of) the document. Raises BadRecord where there is none."""
    if name not in fields and (value := field_at(fields, name)) is not None:
        fields = {name: value}
    text = _string(fields, name)
    if text is None:
        raise BadRecord("no text", f"in column {name!r} (the columns are {', '.join(fields) or 'none'})")
    return text


def _string(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    advice = ""
    if isinstance(value, dict) and value:
        advice = f"; name one of its fields, as in {name + '.' + next(iter(value))!r}"
    raise BadRecord(f"column {name!r} is not a string", f"but {kind_of(value)}{advice}")


_KINDS: dict[type, str] = {
    type(None): "null", bool: "a Boolean", str: "a string", list: "a list", dict: "an object"
}  # fmt: skip


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return _KINDS.get(type(value), "a number")


def _id(value: Any, id_column: str, text: str) -> str:
    if value is None or value == "" or value != value:  # NaN: pandas has no other integer that is missing
        if id_column != "id":
            raise BadRecord("no id", f"in column {id_column!r}")
        return content_id(text)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise BadRecord("id is neither string nor number", f"but {kind_of(value)} (name another id column)")


def meta_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `meta` of a line with these fields. Raises BadRecord where it is nested too deeply."""
    return _meta(fields.get("meta"))


def meta_of_row(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a table's row, {column: Python value}."""
    try:
        value = _json_value(fields.get("meta"), "meta")
    except BadRecord:
        return {}  # a foreign column of that name
    return _meta(value)


def _meta(value: Any) -> dict[str, Any]:
    """`meta` is ours where it is an object (in Parquet we keep it as JSON); a foreign column of that name is left."""
    if isinstance(value, dict):
        return value
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json_data.loads(value)
            json.dumps(value, ensure_ascii=False).encode()
        except json_data.TooDeep:
            raise _TooDeep from None
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}


def _json_value(value: Any, column: str, bytes_are_text: bool = False) -> Any:
    """A table's value as JSON knows it: times as ISO 8601, durations in seconds, decimals as their digits, UUIDs in
    their usual form."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json_value(item, column, bytes_are_text) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item, column, bytes_are_text) for item in value]
    if isinstance(value, bytes) and bytes_are_text:
        return _decoded(value, column)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    raise BadRecord(f"column {column!r} holds {type(value).__name__}", "which has no form in JSON")


def _decoded(value: bytes, column: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"column {column!r} holds bytes", f"that are no UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
