"""JSON that others wrote, read within bounds, so that nothing in it can exhaust the memory or Python's stack; and JSON
as people read it."""

import json
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError, one_line

MAX_NESTING = 100
"""How many lists and objects may be inside each other. Arrow allows about as many in tables, and code that goes through
a value by recursion (copying, writing, chat templates) stays far from Python's own limit."""
MAX_FILE_BYTES = 256 << 20
"""The largest file of settings or descriptions that is read. The largest known are tokenizers of some 30 MB."""


class TooDeep(ValueError):
    """JSON that is nested more than MAX_NESTING levels deep."""

    def __init__(self) -> None:
        super().__init__(f"more than {MAX_NESTING} levels of lists and objects")


def is_deep(value: Any) -> bool:
    """Whether a value is nested more than MAX_NESTING levels deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_NESTING):
        inner = (item for each in level for item in (each.values() if isinstance(each, dict) else each))
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def loads(text: str) -> Any:
    """The value that `text` holds. Raises ValueError: TooDeep, an integer of over 4,300 digits, or no JSON."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise TooDeep from None
    if may_be_deep(text) and is_deep(value):
        raise TooDeep
    return value


def may_be_deep(text: str | bytes) -> bool:
    """Whether JSON has enough brackets for too deep a nesting: it costs next to nothing."""
    opening: tuple[Any, Any] = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    return sum(map(text.count, opening)) > MAX_NESTING


def read_json(path: Path) -> Any:
    """The value in a file of JSON. Raises OSError, and ValueError where it is too large or as `loads` does."""
    if (num_bytes := path.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"{num_bytes:,} bytes are too many: the limit is {MAX_FILE_BYTES:,}")
    return loads(path.read_text(encoding="utf-8"))


def read_object(path: Path, advice: str = "restore it") -> dict[str, Any]:
    """The mapping in a file of JSON; empty when there is no file. Raises UserError with `advice` for other content."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
        json.dumps(content, ensure_ascii=False).encode()  # no halves of characters, which no file could hold
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({one_line(error)}); {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; {advice}")
    return content


def pretty(value: Any, *, indent: int = 2) -> bytes:
    """JSON over several lines, each with its end, in UTF-8."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()
