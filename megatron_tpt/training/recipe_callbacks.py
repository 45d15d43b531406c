"""The callbacks of a recipe: built-in ones by name, a user's as package.module:Class, each with its settings.

    callbacks:
      profile: {max_memory_events: 5000000}
      my_package.my_module:StopWhenFlat:
        patience: 3

The parameters of a callback's class (its fields, if it is a dataclass) are its settings; their types determine what a
recipe may give. A user's module is imported from the current folder or PYTHONPATH, and only for the recipe that is run:
modules that a checkpoint's recipe names are never imported.
"""

import dataclasses
import functools
import importlib
import inspect
import os
import re
import sys
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from megatron_tpt.config.convert import Converter, did_you_mean, is_section
from megatron_tpt.config.describe import default_of, documentation_of, type_of
from megatron_tpt.config.fields import plain
from megatron_tpt.config.yaml_file import Key, before_message, dotted
from megatron_tpt.errors import UserError
from megatron_tpt.training.callbacks import SaveCheckpoints, default_callbacks
from megatron_tpt.training.trainer import Callback

_INTRODUCTION = f"""## callbacks

A mapping of callbacks, which act around the training loop, to their settings. The built-in callbacks below act in every
run, in this order, and mostly read other sections; their remaining settings are given here, as in
`profile: {{max_memory_events: 5000000}}`.

Name a callback of your own as `package.module:Class`: a subclass of `{Callback.__module__}.{Callback.__name__}` in a
module of the current folder or of `PYTHONPATH`. The parameters of its class are its settings. It acts before
`save_checkpoints`. Only the recipe that is run is consulted, never that of a checkpoint; if they differ, a resumed run
warns.

| callback | what it does | settings |
|---|---|---|"""
Section = Mapping[str, Mapping[str, Any]]
"""The section `callbacks`: names and settings."""


class Choice(NamedTuple):
    """A callback that a recipe names."""

    kind: type[Callback]
    settings: dict[str, Any]
    """The settings that the recipe gives."""


def built_in_callbacks() -> dict[str, type[Callback]]:
    """The callbacks of every run by their names in recipes, such as save_checkpoints."""
    kinds = map(type, default_callbacks())
    return {re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower(): kind for kind in kinds}


def describe_callbacks() -> str:
    """The section of docs/recipe.md on callbacks, as Markdown."""
    lines = [_INTRODUCTION]
    for name, kind in built_in_callbacks().items():
        meanings = documentation_of(kind)[1]
        settings = [
            f"`{field.name}` (`{type_of(field.type)}`; default `{default_of(field)}`): {meanings[field.name]}"
            for field in dataclasses.fields(settings_type(kind))
        ]
        purpose = " ".join((kind.__doc__ or "").split())
        lines.append(f"| `{name}` | {purpose} | {'<br>'.join(settings) or 'none'} |")
    return "\n".join(lines) + "\n"


def build_callbacks(section: Section) -> list[Callback]:
    """The built-in callbacks with the settings of a recipe, and the user's callbacks.

    The user's callbacks act before a checkpoint is saved, which therefore has their state after the step.
    """
    chosen = {choice.kind: _make(name, choice) for name, choice in read_callbacks(section, {}).items()}
    result: list[Callback] = []
    for default in default_callbacks():
        if isinstance(default, SaveCheckpoints):
            own = set(chosen) - set(built_in_callbacks().values())
            result += [callback for kind, callback in chosen.items() if kind in own]
        result.append(chosen.get(type(default), default))
    return result


def _make(name: str, choice: Choice) -> Callback:
    try:
        return choice.kind(**choice.settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"callbacks.{name}: {error}") from error


def read_callbacks(section: Section, places: Mapping[Key, str]) -> dict[str, Choice]:
    """The callbacks that a recipe names; imports their modules. Raises UserError with all mistakes, one per line, each
    with its place from `places` if it is known."""
    where = functools.partial(before_message, places)
    chosen: dict[str, Choice] = {}
    converter = Converter(where, lambda key: _suggest(chosen[str(key[1])].kind, str(key[-1])))
    for name, raw in section.items():
        key = ("callbacks", name)
        try:
            kind = _find(name)
            _require_own_name(kind, chosen)
            chosen[name] = Choice(kind, {})
            settings = converter.section(settings_type(kind), raw, key)
        except UserError as error:
            converter.problems.append(f"{where(key)}{dotted(key)}: {error}")
            continue
        chosen[name].settings.update({field: getattr(settings, field, None) for field in raw})
    converter.raise_problems()
    return chosen


def _require_own_name(kind: type[Callback], chosen: Mapping[str, Choice]) -> None:
    """Raise UserError when another callback's class has the same name, which identifies its state in a checkpoint."""
    others = {name: one.kind for name, one in chosen.items()}
    others |= {name: one for name, one in built_in_callbacks().items() if one is not kind}
    if twin := next((name for name, other in others.items() if other.__name__ == kind.__name__), None):
        raise UserError(f"{kind.__name__} is the name of the class of {twin} too: give each once, or rename yours")


def settings_type(kind: type[Callback]) -> type:
    """A dataclass with the parameters of a callback's class as fields. Raises UserError for a parameter without a type,
    or with one that a recipe cannot give."""
    try:
        hints, fields = get_type_hints(kind.__init__, include_extras=True), []
    except NameError as error:
        raise UserError(f"the types of {kind.__name__}'s parameters cannot be read ({error}): fix them") from None
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint = hints.get(parameter.name)
        if not _can_be_given(hint):
            raise UserError(
                f"{kind.__name__}({parameter.name}) has {'no type' if hint is None else f'the type {hint}'}, and a "
                f"recipe gives int, float, bool, str, Path, Literal, lists of them, or a dataclass: annotate it so"
            )
        is_required = parameter.default is parameter.empty
        default = dataclasses.field() if is_required else _constant(parameter.default)
        fields.append((parameter.name, hint, default))
    return dataclasses.make_dataclass(kind.__name__, fields, kw_only=True)


def _constant(value: Any) -> Any:
    return dataclasses.field(default_factory=lambda: value)


def _can_be_given(hint: Any) -> bool:
    hint = plain(hint)
    others = [one for one in get_args(hint) if one is not type(None)]
    if get_origin(hint) in (Union, types.UnionType) and len(others) > 1:
        return all(_can_be_given(one) and get_origin(one) is not list and not is_section(one) for one in others)
    if get_origin(hint) in (list, Union, types.UnionType):
        return _can_be_given(others[0])
    return hint in (int, float, bool, str, Path) or get_origin(hint) is Literal or is_section(hint)


def _suggest(kind: type[Callback], name: str) -> str:
    """The suggestion for a setting that a callback does not have."""
    known = [field.name for field in dataclasses.fields(settings_type(kind))]
    others = f"; known there: {', '.join(known)}" if known else f"; {kind.__name__} has no settings"
    return did_you_mean(name, known) or others


def _find(name: str) -> type[Callback]:
    """The class that a recipe names. Raises UserError when there is none."""
    built_in = built_in_callbacks()
    if name in built_in:
        return built_in[name]
    module_name, colon, class_name = name.partition(":")
    if not colon:
        others = f": name one of {', '.join(built_in)}, or your own as package.module:Class"
        raise UserError(f"unknown{did_you_mean(name, built_in) or others}")
    kind = getattr(import_module(module_name), class_name, None)
    if kind is None:
        raise UserError(f"the module {module_name} has no {class_name}: write package.module:Class as it is there")
    if not (isinstance(kind, type) and issubclass(kind, Callback)):
        raise UserError(f"{class_name} is no callback: derive it from {Callback.__module__}.{Callback.__name__}")
    return kind


def import_module(name: str) -> types.ModuleType:
    """Import a user's module, also from the current folder, which console scripts do not put on sys.path."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{name!r} is no name of a module: write package.module:Class")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"there is no module {error.name} in {os.getcwd()} or PYTHONPATH: put the folder that it is in there"
            ) from None
        raise UserError(f"{name} needs the module {error.name}, which is not installed: install it") from error
    except Exception as error:
        last = error if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{name} cannot be imported ({last.filename}:{last.lineno}: {type(error).__name__}: {error}): fix it there"
        ) from error
