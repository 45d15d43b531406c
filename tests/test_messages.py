"""Options that messages and help texts name are options that the tools have."""

import ast
import dataclasses
import importlib.util
import re
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_tpt.config import cli
from megatron_tpt.config.command_line import options_of
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.rl import RLRecipe

ROOT = Path(__file__).parents[1]
# A star or a hyphen at the end means several options, as in --minhash-*.
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*(?:\.[a-z_][\w-]*)*")
# Of torchrun and Slurm, and placeholders for any option of a recipe.
OF_OTHER_PROGRAMS = {"--nproc-per-node", "--job", "--section.key"}
OF_STYLE_SHEETS = {"--own"}  # variables of CSS look like options
OF_TRAINING = {"--dry-run", "--device", "--mfu", "--help", "--recipe", "--cache-dir"}


class _Parsed(BaseException):
    pass


@cache
def options_of_tools() -> dict[str, frozenset[str]]:
    """The options of every tool that has a dataclass of them, by the tool's name."""
    found: dict[str, frozenset[str]] = {}

    def note(options: type, *_: Any, **__: Any) -> None:
        names = {option.name for option in options_of(options)}
        found[tool.stem] = frozenset(f"--{no}{name}" for name in names for no in ("", "no-"))
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "parse", note)
        for tool in sorted((ROOT / "megatron_tpt/tools").glob("[a-z]*.py")):
            spec = importlib.util.spec_from_file_location(f"tool_{tool.stem}", tool)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            if tool.stem != "build_cache":  # it takes a recipe
                with pytest.raises(_Parsed):
                    module.main()
    return found


def options_of_recipe(recipe: type, prefix: str = "--") -> Iterator[str]:
    """`--section.field` for every field of a recipe."""
    hints = typing.get_type_hints(recipe)
    for field in dataclasses.fields(recipe):
        kinds = [hints[field.name], *typing.get_args(hints[field.name])]
        yield (name := f"{prefix}{field.name}")
        for kind in kinds:
            if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                yield from options_of_recipe(kind, f"{name}.")


def named_options(path: Path) -> dict[str, int]:
    """The options that the texts for users in a module name, and the line of each: what is said in sentences, and the
    docstrings that make up the help of tools."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    is_help = path.parent.name == "tools" or "options" in path.stem
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        is_sentence = isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
        if is_sentence and (is_help or id(node) not in docstrings):
            found |= {name: node.lineno for name in OPTION.findall(str(node.value))}
    return found


def is_option(name: str, options: frozenset[str] | set[str]) -> bool:
    name = name.replace("_", "-")
    if name.endswith("-"):
        return any(option.startswith(name) for option in options)
    return name in options or any(option.startswith(f"{name}.") for option in options)


def test_every_option_that_a_message_names_exists() -> None:
    recipe = {name for kind in (PretrainRecipe, FinetuneRecipe, RLRecipe) for name in options_of_recipe(kind)}
    known = frozenset[str]().union(*options_of_tools().values())
    known |= {name.replace("_", "-") for name in recipe} | OF_TRAINING | OF_OTHER_PROGRAMS | OF_STYLE_SHEETS
    assert len(options_of_tools()) > 10 and is_option("--num-workers", known) and not is_option("--num-wokers", known)
    unknown, num_named = [], 0
    for path in sorted((ROOT / "megatron_tpt").rglob("*.py")):
        for name, line in named_options(path).items():
            num_named += 1
            if not is_option(name, known):
                unknown.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not unknown
    assert num_named > 100


@pytest.mark.parametrize(
    ("folder", "tools"),
    [
        ("corpus", ["prepare", "curate"]),
        ("evaluation", ["evaluate"]),
    ],
)
def test_what_one_tool_says_names_its_own_options(folder: str, tools: list[str]) -> None:
    known = set().union(*(options_of_tools()[tool] for tool in tools))
    for path in (ROOT / "megatron_tpt" / folder).rglob("*.py"):
        assert not [name for name in named_options(path) if not is_option(name, known)], path
