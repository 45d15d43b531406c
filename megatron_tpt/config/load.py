"""From a recipe file and the command line to a checked recipe.

    recipe, arguments = load_recipe(PretrainRecipe, ["recipe.yaml", "--training.num_steps=50", "--dry-run"])

The YAML is read, dotted overrides are written into it, the recipe fills in what comes from elsewhere (a model preset),
and the result becomes dataclasses.
Unknown keys and wrong types are refused, all of them at once, each with its file and line. No torch is imported: a
mistake is reported within a second.
"""

import copy
import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron_tpt.config.command_line import COMMAND_LINE, read_words
from megatron_tpt.config.convert import Converter, expand_path
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.config.suggestions import suggest
from megatron_tpt.config.yaml_file import Key, YamlFile, before_message, read_yaml_file
from megatron_tpt.errors import UserError
from megatron_tpt.logs import print_result

logger = logging.getLogger(__name__)

USAGE = (
    "RECIPE.yaml [--section.key=value ...] [--help]\n"
    "       [--dry-run[=PROCESSES] [--device=cpu|a100|h100|h200|b200|gb200] [--mfu=0.4]]"
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError when there is no file, no YAML or no mapping."""
    return read_yaml_file(path).content


def _apply_override(file: YamlFile, key: str, value: str) -> None:
    """Write what the command line gives into what the file gives. A mapping is merged into the section, key by key."""
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        parsed = value
    _write(file, tuple(key.split(".")), parsed)


def _write(file: YamlFile, key: tuple[str, ...], value: Any) -> None:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            _write(file, (*key, str(name)), item)
        return
    raw = file.content
    for end, section in enumerate(key[:-1], start=1):
        if raw.get(section) is None:
            raw[section] = {}
        raw = raw[section]
        if not isinstance(raw, dict):
            raise UserError(f"--{'.'.join(key)}: {'.'.join(key[:end])} is not a section of the recipe")
    raw[key[-1]] = value
    for known in [known for known in file.places if known[: len(key)] == key]:
        del file.places[known]
    file.places[key] = COMMAND_LINE


@dataclasses.dataclass
class Arguments:
    """What a training program was called with."""

    path: Path
    """The recipe file."""
    overrides: list[tuple[str, str]]
    """Dotted keys and their values, in their order."""
    dry_run: bool = False
    """Describe the run and start nothing."""
    num_processes: int | None = None
    """Processes the dry run assumes; as few as the layout allows when not given."""
    device: str | None = None
    """Device the dry run assumes, such as h100; that of this machine when not given."""
    mfu: float | None = None
    """Share of the device's peak that the dry run assumes."""
    places: dict[Key, str] = dataclasses.field(default_factory=dict)
    """Where every key of the recipe is from: FILE:LINE, or the command line."""


def _read_option(arguments: Arguments, name: str, value: str) -> None:
    """Take `--name=value`, which is no field of a recipe, into the arguments."""
    if name == "dry-run":
        arguments.dry_run = True
        if value and not (value.isdecimal() and int(value) >= 1):
            raise UserError(f"--dry-run={value}: the number of processes must be a whole number from 1")
        arguments.num_processes = int(value) if value else None
    elif name == "device":
        arguments.device = value.lower()
    else:
        try:
            arguments.mfu = float(value)
        except ValueError:
            arguments.mfu = 0.0
        if not 0 < arguments.mfu <= 1:
            raise UserError(f"--mfu={value}: must be a share of the peak, above 0 and at most 1, as in --mfu=0.4")


def _read_arguments(argv: Sequence[str]) -> Arguments:
    arguments = Arguments(Path(), [])
    paths, options = read_words(argv, lambda name: 0 if name == "dry-run" else 1)
    for name, words in options:
        value = words[0] if words else ""
        if name in ("dry-run", "device", "mfu"):
            _read_option(arguments, name, value)
        else:
            arguments.overrides.append((name, value))
    if len(paths) != 1:
        found = f"{len(paths)} ({', '.join(paths)})" if paths else "none"
        raise UserError(f"expected one recipe file, got {found}: usage: {' '.join(USAGE.split())}")
    if not arguments.dry_run and (arguments.device is not None or arguments.mfu is not None):
        raise UserError("--device and --mfu say what --dry-run assumes: give it too, or omit them")
    arguments.path = expand_path(paths[0])
    return arguments


def _build[R: Recipe](cls: type[R], raw: dict[str, Any], places: dict[Key, str], warnings: list[str]) -> R:
    """Raises UserError with all that is wrong, one line each; notes what is written under an old name."""
    converter = Converter(partial(before_message, places), lambda key: suggest(cls, key))
    recipe = converter.section(cls, raw, ())
    converter.raise_problems()
    warnings += converter.warnings
    return recipe


def recipe_from_dict[R: Recipe](
    cls: type[R], raw: dict[str, Any], places: dict[Key, str] | None = None, warnings: list[str] | None = None
) -> R:
    """Dataclasses from nested mappings. Raises UserError that names every unknown key and wrong type, with its place in
    `places` where it is known. What is written under an old name is added to `warnings`."""
    raw, places, warnings = copy.deepcopy(raw), places or {}, [] if warnings is None else warnings
    cls.complete(raw)
    recipe = _build(cls, raw, places, warnings)
    given = copy.deepcopy(raw)
    cls.expand(raw)
    if raw == given:
        return recipe
    # Files of sources have replaced the items of its lists: mistakes in those are reported at the list.
    places = {key: place for key, place in places.items() if not any(isinstance(k, int) for k in key)}
    return _build(cls, raw, places, [])


def load_recipe[R: Recipe](cls: type[R], argv: Sequence[str]) -> tuple[R, Arguments]:
    """The recipe that a training program's command line describes, and the command line.

    `--help` prints every field with its documentation and leaves with code 0.
    """
    if "--help" in argv or "-h" in argv:
        from megatron_tpt.config.reference import help_text

        print_result(help_text(cls, f"megatron_tpt.{cls.program}", USAGE))
        raise SystemExit(0)
    arguments = _read_arguments(argv)
    file = read_yaml_file(arguments.path)
    given: dict[str, str] = {}
    for key, value in arguments.overrides:
        if given.get(key, value) != value:
            logger.warning(f"--{key} is given twice: {value} counts, and {given[key]} does not")
        given[key] = value
        _apply_override(file, key, value)
    arguments.places = file.places
    warnings: list[str] = []
    recipe = recipe_from_dict(cls, file.content, file.places, warnings)
    for warning in warnings:
        logger.warning(warning)
    return recipe, arguments


def to_dict(value: Any) -> Any:
    """A recipe (or a part of one) as plain mappings, lists and strings for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# libyaml's where PyYAML has it: of thousands of sources Python's own takes seconds.
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def to_yaml(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML, which load_recipe reads back to the same recipe."""
    return str(yaml.dump(to_dict(recipe), Dumper=_Dumper, sort_keys=False))
