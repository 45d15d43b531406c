"""What `--help` and the generated references say of every field: its type, bounds, default and meaning."""

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from megatron_tpt.config.command_line import options_of
from megatron_tpt.config.convert import choices_of, is_list, is_required, is_section
from megatron_tpt.config.fields import alternatives, bounds_of, plain

WIDTH = 110
"""Columns of the texts of `--help`."""
RECIPE_MEANING = (
    "A YAML file of options, `text_column: VALUE`; what comes after it on the command line replaces its values."
)


def type_of(hint: Any) -> str:
    """The type of a field in Python's and YAML's terms, with its bounds: `int >= 1 | all`, `list[path]`."""
    if len(alternatives(plain(hint))) > 1:
        return " | ".join(type_of(one) for one in alternatives(plain(hint)) if one is not type(None))
    if choices := choices_of(plain(hint)):
        return " | ".join(map(str, choices))
    if is_list(hint):
        return f"list[{type_of(get_args(plain(hint))[0])}]"
    name = "path" if plain(hint) is Path else plain(hint).__name__
    limits = dict(bounds_of(hint))
    below = next((f" {sign} {limits[kind]}" for kind, sign in (("le", "<="), ("lt", "<")) if kind in limits), "")
    for kind, sign, turned in (("ge", ">=", "<="), ("gt", ">", "<")):
        if kind in limits:
            return f"{limits[kind]} {turned} {name}{below}" if below else f"{name} {sign} {limits[kind]}"
    return name + below


def default_of(field: dataclasses.Field) -> str:
    """The default of a field as it is written in YAML; empty for none, "required" where a value must be given."""
    if is_required(field):
        return "required"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None or dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        value = [str(item) if isinstance(item, Path) else item for item in value]
    return str(value)


def field_cells(name: str, hint: Any, field: dataclasses.Field, meaning: str) -> list[str]:
    """A field in a table of the references: name, type, default, meaning."""
    links = [f"[{cls.__name__}](#{cls.__name__.lower()})" for cls in sections_in(hint)]
    default = default_of(field)
    shown = f"list of {links[0]}" if links and is_list(hint) else links[0] if links else f"`{type_of(hint)}`"
    return [f"`{name}`", shown, f"`{default}`" if default not in ("", "required") else default, meaning]


def table_row(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def documentation_of(cls: type) -> tuple[str, dict[str, str]]:
    """The docstring of a dataclass in one line, and those of its fields by name, inherited ones included."""
    sections = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    meanings = {name: text for section in sections for name, text in _field_docstrings(section)}
    return " ".join((cls.__doc__ or "").split()), meanings


def _field_docstrings(cls: type) -> Iterator[tuple[str, str]]:
    """The string that follows each field of a dataclass, in one line."""
    for field, text in itertools.pairwise(_class_bodies(cls.__module__).get(cls.__name__, [])):
        match field, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(meaning))):
                yield name, " ".join(meaning.split())


@functools.cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    """The statements of a module's classes, by the names of the classes. (A library that reads one class at a time
    parses the module for each, which takes most of the time of `--help`.)"""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):  # a module without a file
        return {}
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


def help_lines(name: str, hint: Any, field: dataclasses.Field, meaning: str) -> Iterator[str]:
    """A field as `--help` shows it."""
    default = default_of(field)
    notes = default if default == "required" else f"default: {default}" if default else ""
    yield f"  {name}  ({'; '.join(filter(None, [type_of(hint), notes]))})"
    yield from textwrap.wrap(meaning, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)


def options_help(cls: type, description: str) -> str:
    """What `--help` prints for a tool whose options are a `cls`."""
    options = list(options_of(cls))
    given = [option.written + " ..." * is_list(option.hint) for option in options if option.is_positional]
    given += [f"{option.written} VALUE" for option in options if is_required(option.field) and not option.is_positional]
    lines = [f"usage: {' '.join([sys.argv[0], *given])} [OPTION ...]", "", description.strip(), ""]
    for option in options:
        name = option.written
        name += f", --no-{option.name}" if option.is_flag and option.field.default is True else ""
        lines += help_lines(
            name, option.hint, option.field, documentation_of(option.section)[1].get(option.key[-1], "")
        )
    lines += ["  --recipe  (path)", " " * 8 + RECIPE_MEANING, "  --help", " " * 8 + "Print this."]
    return "\n".join(lines)


def sections_in(hint: Any) -> Iterator[type]:
    """The dataclasses that a type mentions."""
    if is_section(hint):
        yield plain(hint)
    for one in get_args(plain(hint)):
        yield from sections_in(one)
