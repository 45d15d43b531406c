"""All options of all tools as Markdown: python -m megatron_tpt.tools > docs/tools.md"""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import megatron_tpt.tools
from megatron_tpt.config.command_line import options_of
from megatron_tpt.config.describe import RECIPE_MEANING, documentation_of, field_cells, table_row
from megatron_tpt.config.renamed import names_of_before
from megatron_tpt.logs import print_result

_INTRODUCTION = f"""# Tools

All options of the tools. An option that is a `bool` is given without a value, and turned off with `no-` before its name
(`--no-verify`); a list takes several values, up to the next option. Every tool that has options takes them from files,
too: `--recipe FILE`. {RECIPE_MEANING}

Written by `python -m megatron_tpt.tools`.
"""


def tools() -> dict[str, ModuleType]:
    """The modules of the tools by their names."""
    names = [module.name for module in pkgutil.iter_modules(megatron_tpt.tools.__path__) if module.name[0] != "_"]
    return {name: importlib.import_module(f"megatron_tpt.tools.{name}") for name in names}


def options_class(tool: ModuleType) -> type | None:
    """The dataclass of a tool's options; None for a tool that takes a recipe of training."""
    found: list[type] = [one for name, one in vars(tool).items() if name.endswith("Options")]
    assert len(found) <= 1, f"{tool.__name__} has several classes of options"
    return next(iter(found), None)


def _section(name: str, tool: ModuleType) -> Iterator[str]:
    purpose, _, examples = (tool.__doc__ or "").strip().partition("\n\n")
    yield f"\n## tools/{name}.py\n\n{' '.join(purpose.split())}\n"
    commands = [line for line in examples.splitlines() if line.startswith(("python ", "torchrun "))]
    yield "\n".join(["```bash", *commands, "```"])
    cls = options_class(tool)
    if cls is None:
        return
    yield "\n| option | type | default | meaning |\n|---|---|---|---|"
    for option in options_of(cls):
        meaning = documentation_of(option.section)[1].get(option.key[-1], "")
        yield table_row(field_cells(option.written, option.hint, option.field, meaning))
    for before, now in names_of_before(cls).items():
        old, new = (name.replace("_", "-") for name in (before, now))
        yield f"\n`--{old}` is the name of `--{new}` in the release before; this one reads it, too."


def reference() -> str:
    """Every tool with its examples and options."""
    return "\n".join([_INTRODUCTION, *(line for name, tool in tools().items() for line in _section(name, tool))]) + "\n"


if __name__ == "__main__":
    print_result(reference(), end="")
