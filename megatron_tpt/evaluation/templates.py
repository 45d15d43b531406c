"""Prompts from the columns of a row."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.records import describe, expand_sources, read_rows


def template_text(given: str) -> str:
    """The template that an option names: its text, or the file with it. Raises UserError for one without columns."""
    if "{" in given:
        return unescaped(given)
    template = read_text(Path(given))
    if "{" not in template:
        raise UserError(f"{given}: the template names no column, such as {{question}}")
    return template


def unescaped(text: str) -> str:
    """A text as it is typed on a command line, where \\n is a line break."""
    return text.replace("\\n", "\n")


def fill(
    template: str, row: Mapping[str, Any], where: str, more: Mapping[str, str] | None = None, option: str = ""
) -> str:
    """The template with the row's columns (and `more`) in place of their names.

    Braces that hold no name stay, so that a template can hold LaTeX. Messages name the `option` that gave it.
    """
    more = more or {}

    def replacement(match: re.Match[str]) -> str:
        name = match[1]
        return (
            more[name] if name in more else column(row, name, where, option and f", which {option} names as {{{name}}}")
        )

    return re.sub(r"\{(\w+(?:\.\w+)*)\}", replacement, template)


def column(row: Mapping[str, Any], name: str, where: str, named_by: str = "") -> str:
    """A column as text; of a list of texts, one on each line."""
    value = value_of(row, name, where, named_by)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return str(number_or_text(value, name, where))


def value_of(row: Mapping[str, Any], name: str, where: str, named_by: str = "") -> Any:
    """The value of a column; `choices.text` is the field `text` of the column `choices`, if none has the whole name.

    Raises UserError for one that is missing or null; the message says `named_by` after its name.
    """
    first, _, rest = name.partition(".")
    inner = row.get(first)
    if name not in row and isinstance(inner, Mapping) and rest in inner:
        value = inner[rest]
    elif name in row or (rest and inner is None and first in row):
        value = row.get(name)
    else:
        raise UserError(f"{where}: no column {name!r}{named_by}; its columns are {', '.join(row) or 'none'}")
    if value is None:
        raise UserError(f"{where}: column {name!r}{named_by} is null; give it a value or remove the row")
    return value


def number_or_text(value: Any, name: str, where: str) -> str | int | float:
    """A value that is one of these. Raises UserError for another."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: column {name!r} is neither text nor number")
    return value


def rows_of(data: str | Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Place ("file:line"), an id (the line's number; of several files, the place) and the fields of every row."""
    sources = expand_sources([data])
    for source in sources:
        for row in read_rows(source):
            if row.value is None:
                raise UserError(describe(source, row, "fix the line"))
            place = f"{source.name}:{row.number + 1}"
            yield place, place if len(sources) > 1 else str(row.number + 1), row.value


def num_rows_of(path: Path) -> int:
    """The rows of a file, those that cannot be read included."""
    return sum(1 for source in expand_sources([path]) for _ in read_rows(source))


def read_text(path: Path) -> str:
    """The text of a file. Raises UserError for one that is not there, or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
