"""All fields of recipes, as the Markdown of docs/recipe.md and as the text of --help."""

import dataclasses
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object

from megatron_tpt.config.convert import is_section
from megatron_tpt.config.load import to_dict
from megatron_tpt.config.model import section_classes
from megatron_tpt.config.on_change import Effect, effects_of
from megatron_tpt.config.recipe import Recipe

_INTRODUCTION = """# Recipes

All fields of the YAML files that `megatron_tpt.pretrain` and `megatron_tpt.finetune` take. `section.field` is also an
option on the command line: `--optimizer.learning_rate=1e-4`. Written by `python -m megatron_tpt.recipes.reference`.

The last two columns say what becomes of a value that is not the one in the `recipe.yaml` of the checkpoint: when a run
resumes from it, and when a new run starts from its weights (`training.init_from`, which also takes over the fields of
`model` that are not given). A field that has no effect beside the others of the recipe is never in the way.
"""


def name_of(hint: Any) -> str:
    """What a field of a type takes, as Markdown."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{to_dict(value)}`" for value in get_args(hint))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    arguments = [name_of(one) for one in get_args(hint) if one is not type(None) and one is not Ellipsis]
    if get_origin(hint) in (list, tuple):
        return f"list of {arguments[0]}"
    if get_origin(hint) is dict:
        return f"mapping of {arguments[0]} to {arguments[1]}"
    if arguments:
        return " or ".join(arguments)
    return {Path: "path", str: "text", float: "number", int: "whole number", bool: "true, false"}.get(hint, str(hint))


def default_of(field: dataclasses.Field) -> str:
    """The default of a field as Markdown; nothing for None and for a section."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None or dataclasses.is_dataclass(value):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else to_dict(value)}`"


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for one in get_args(hint):
        yield from _dataclasses_in(one)


def meanings_of(cls: type) -> dict[str, str]:
    """What the fields of a dataclass mean; those that it inherits included."""
    sections = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    params = [one for section in sections for one in parse_from_object(section).params]
    return {one.arg_name: " ".join((one.description or "").split()) for one in params}


def _table(cls: type, title: str, described: dict[type, str]) -> Iterator[str]:
    """The section of a dataclass; of one that extends a section described before, only what it adds."""
    documentation = parse_from_object(cls)
    meanings = meanings_of(cls)
    hints = get_type_hints(cls)
    base = next((base for base in cls.__mro__[1:] if base in described), None)
    known = {field.name: default_of(field) for field in dataclasses.fields(base)} if base else {}
    yield f"\n## {title}\n"
    yield " ".join(filter(None, [documentation.short_description, documentation.long_description])) + "\n"
    if base:
        yield f"The fields of [{described[base]}](#{described[base]}), and these.\n"
    yield "| field | values | default | meaning | on resume | from `init_from` |\n|---|---|---|---|---|---|"
    for field in dataclasses.fields(cls):
        cells = [f"`{field.name}`", name_of(hints[field.name]), default_of(field), meanings.get(field.name, "")]
        cells += [effect.label for effect in effects_of(cls, field.name)]
        if known.get(field.name) != default_of(field):
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    described[cls] = title
    for inner in [one for hint in hints.values() for one in _dataclasses_in(hint)]:
        if inner not in described:
            yield from _table(inner, inner.__name__, described)


def _sections_of(recipe: type) -> Iterator[tuple[str, type]]:
    """The name and the class of every section of a recipe; of the model, one for each family."""
    for name, hint in get_type_hints(recipe).items():
        if is_section(hint):
            yield from ((name, cls) for cls in section_classes(hint))


def reference(kinds: Sequence[type[Recipe]]) -> str:
    """Every section of the recipes as a table, and the dataclasses in them; what several kinds share is there once."""
    lines, described = [_INTRODUCTION], dict[type, str]()
    lines += [f"- **{effect.label}**: {effect.meaning}." for effect in Effect]
    for name, cls in _sections_of(Recipe):
        if name != "data":  # of another family of models by its name
            title = f"{name} ({cls().family})" if name in described.values() else name
            lines += _table(cls, title, described)
    for kind in kinds:
        for name, cls in _sections_of(kind):
            if cls not in described:
                lines += _table(cls, f"{name} ({kind.activity})", described)
    return "\n".join(lines) + "\n"


def help_text(cls: type, module: str, usage: str) -> str:
    """What `--help` prints for a recipe of type `cls`: every field that the command line takes, with its meaning."""
    lines = [f"usage: python -m {module} {usage}", "", str(cls.__doc__), "", "examples:"]
    lines.append(f"  python -m {module} recipe.yaml --training.num_steps=100 --run.output_dir=runs/a")
    lines.append(f"  torchrun --nproc-per-node 8 -m {module} recipe.yaml")
    lines += [f"  python -m {module} recipe.yaml --dry-run=64 --device=h100", ""]
    for name, hint in get_type_hints(cls).items():
        if not is_section(hint):
            lines += textwrap.wrap(f"{name}: {meanings_of(cls)[name]}", 110, subsequent_indent=" " * 8)
            lines += ["", f"  --{name}.NAME.SETTING, or --{name}={{NAME: {{SETTING: VALUE}}}}", ""]
    listed = set[str]()  # of a family of models what it adds to the first one
    for name, section in _sections_of(cls):
        meanings = meanings_of(section)
        lines += [f"{name}: {' '.join((section.__doc__ or '').split())}", ""]
        for field in dataclasses.fields(section):
            if f"{name}.{field.name}" in listed:
                continue
            listed.add(f"{name}.{field.name}")
            default = default_of(field).strip("`")
            values = name_of(get_type_hints(section)[field.name]).replace("`", "")
            values = re.sub(r"\[(\w+)\]\(#\w+\)", r"\1", values)
            lines.append(f"  --{name}.{field.name}  ({values}{f'; default: {default}' if default else ''})")
            lines += textwrap.wrap(meanings.get(field.name, ""), 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines.append("")
    return "\n".join(lines).rstrip()
