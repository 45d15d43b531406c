"""What an unknown key of a recipe may have been meant to be."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, get_args

from megatron_tpt.config.convert import did_you_mean, is_section
from megatron_tpt.config.fields import hints_of
from megatron_tpt.config.model import families, section_classes, spec_named
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.config.yaml_file import Key
from megatron_tpt.names import first_few

_OPTIONS = ("dry-run", "device", "mfu", "help")
_MOST_LISTED = 12


def _section_in(hint: Any) -> Any:
    """The dataclass that a field holds, alone or in a list; None for another type."""
    return hint if is_section(hint) else next((one for one in get_args(hint) if is_section(one)), None)


def _names_in(cls: Any, key: Key) -> list[str]:
    """The fields of the section at `key`, in which places in lists do not count."""
    for name in [part for part in key if isinstance(part, str)]:
        cls = _section_in(hints_of(cls).get(name)) if cls is not None else None
    classes = section_classes(cls) if cls is not None else []
    return list(dict.fromkeys(field.name for one in classes for field in dataclasses.fields(one)))


def _names_below(cls: type) -> tuple[str, ...]:
    def walk(cls: Any, prefix: str) -> Iterator[str]:
        hints = hints_of(cls)
        for name in (field.name for field in dataclasses.fields(cls)):
            if is_section(hints[name]):
                for one in section_classes(hints[name]):
                    yield from walk(one, f"{prefix}{name}.")
            else:
                yield prefix + name

    return tuple(dict.fromkeys(walk(cls, "")))


_all_names: Callable[[type], tuple[str, ...]] = functools.cache(_names_below)
"""Every dotted name that the command line takes."""


def _families_with(name: str) -> list[str]:
    classes = {family: spec_named(family).config for family in families()}
    return [family for family, cls in classes.items() if name in {field.name for field in dataclasses.fields(cls)}]


def suggest(cls: type[Recipe], key: Key) -> str:
    """What to write behind "unknown" for a key that a recipe of type `cls` does not have."""
    name = str(key[-1]).replace("-", "_")
    siblings = _names_in(cls, key[:-1])
    own = ".".join(part for part in key if isinstance(part, str))
    if own in _all_names(cls):
        return f"; it is a setting of model.family={' or '.join(_families_with(name))}"
    for other in cls.kinds():
        if other is not cls and own in _all_names(other):
            return f"; it is a setting of {other.activity} (megatron_tpt.{other.program})"
    elsewhere: dict[str, list[str]] = {}
    for dotted in _all_names(cls):
        elsewhere.setdefault(dotted.rpartition(".")[2], []).append(dotted)
    return (
        did_you_mean(name, siblings)
        or (did_you_mean(str(key[0]), _OPTIONS, as_shown="--{}".format) if len(key) == 1 else "")
        or did_you_mean(name, elsewhere, cutoff=0.8, as_shown=lambda close: " or ".join(elsewhere[close]))
        or did_you_mean(own, _all_names(cls), cutoff=0.8)
        or (f"; known there: {first_few(siblings, _MOST_LISTED)} (docs/recipe.md)" if siblings else "")
    )
