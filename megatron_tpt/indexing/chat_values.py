"""The values in records of chats: what is empty, a text, a truth value or JSON, and how a record is refused."""

from collections.abc import Mapping
from typing import Any

from megatron_tpt import json_data


class Unusable(Exception):
    """Ends the work on one record: `reason` is the same for all of its kind, `detail` says what is wrong here."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def present(value: Any) -> bool:
    """Whether a value says anything: tables fill up what a row does not have with nulls, writers with empty values."""
    return value is not None and not (isinstance(value, str | list | Mapping) and not value)


def text_of(value: Any, name: str) -> str:
    """`value` if it is a string. Raises Unusable that calls it `name`."""
    if not isinstance(value, str):
        what = "missing" if value is None else f"{type(value).__name__}, not a string"
        raise Unusable("no text", f"{name} is {what}")
    return value


def truth_of(value: Any) -> bool | None:
    """What 1, "true" and the like say; None for any other value."""
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    return {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else None


def maybe_json(value: Any) -> Any:
    """What a string says in JSON, if it does; else the value."""
    if not isinstance(value, str):
        return value
    try:
        return json_data.loads(value)
    except ValueError:
        return value


def parsed(value: Any, name: str) -> Any:
    """What a string says in JSON, or the value that is none. Raises Unusable that calls it `name`."""
    if not isinstance(value, str):
        return value
    try:
        return json_data.loads(value)
    except json_data.TooDeep as error:
        raise Unusable("nested too deeply", f"{name} has {error}") from None
    except ValueError as error:
        raise Unusable("not JSON", f"{name} is text that is not JSON ({error})") from None


def messages_in(value: Any) -> list[Any] | None:
    """The list of messages that a value is, or is the JSON of; None for any other text or value."""
    found = value if isinstance(value, list) else maybe_json(value)
    if not isinstance(found, list) or (found is not value and not (found and all(map(_is_message, found)))):
        return None
    return found


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)
