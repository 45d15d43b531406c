"""All fields of recipes, as the Markdown of docs/recipe.md and as the text of --help."""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence

from megatron_tpt.config.convert import is_section
from megatron_tpt.config.describe import (
    WIDTH,
    default_of,
    documentation_of,
    field_cells,
    help_lines,
    sections_in,
    table_row,
)
from megatron_tpt.config.fields import hints_of
from megatron_tpt.config.model import section_classes
from megatron_tpt.config.on_change import Effect, effects_of
from megatron_tpt.config.recipe import Recipe

_INTRODUCTION = """# Recipes

All fields of the YAML files that `megatron_tpt.pretrain`, `megatron_tpt.finetune` and `megatron_tpt.rl` take.
`section.field` is also an option on the command line: `--optimizer.learning_rate=1e-4`. Written by `python -m
megatron_tpt.recipes.reference`.

The last two columns say what happens to a value that differs from the one in the `recipe.yaml` of the checkpoint: when
a run resumes from it, and when a new run starts from its weights (`training.init_from`, which also takes over the
fields of
`model` that are not given). A field that has no effect given the others of the recipe never prevents a resume.
"""


def _table(cls: type, title: str, described: dict[type, str]) -> Iterator[str]:
    """The section of a dataclass; of one that extends a section described before, only what it adds."""
    text, meanings = documentation_of(cls)
    hints = hints_of(cls)
    base = next((base for base in cls.__mro__[1:] if base in described), None)
    known = {field.name: default_of(field) for field in dataclasses.fields(base)} if base else {}
    yield f"\n## {title}\n"
    yield text + "\n"
    if base:
        yield f"The fields of [{described[base]}](#{described[base]}), and these.\n"
    yield "| field | type | default | meaning | on resume | from `init_from` |\n|---|---|---|---|---|---|"
    for field in dataclasses.fields(cls):
        cells = [*field_cells(field.name, hints[field.name], field, meanings.get(field.name, ""))]
        cells += [effect.label for effect in effects_of(cls, field.name)]
        if known.get(field.name) != default_of(field):
            yield table_row(cells)
    described[cls] = title
    for inner in [one for hint in hints.values() for one in sections_in(hint)]:
        if inner not in described:
            yield from _table(inner, inner.__name__, described)


def _sections_of(recipe: type) -> Iterator[tuple[str, type]]:
    """The name and the class of every section of a recipe; of the model, one for each family."""
    for name, hint in hints_of(recipe).items():
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
    for name, hint in hints_of(cls).items():
        if not is_section(hint):
            lines += textwrap.wrap(f"{name}: {documentation_of(cls)[1][name]}", WIDTH, subsequent_indent=" " * 8)
            lines += ["", f"  --{name}.NAME.SETTING, or --{name}={{NAME: {{SETTING: VALUE}}}}", ""]
    listed = set[str]()  # of a family of models what it adds to the first one
    for name, section in _sections_of(cls):
        text, meanings = documentation_of(section)
        lines += [f"{name}: {text}", ""]
        for field in dataclasses.fields(section):
            option = f"--{name}.{field.name}"
            if option not in listed:
                listed.add(option)
                lines += help_lines(option, hints_of(section)[field.name], field, meanings.get(field.name, ""))
        lines.append("")
    return "\n".join(lines).rstrip()
