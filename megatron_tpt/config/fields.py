"""What a field of a recipe, or of a tool's options, declares in its annotation in addition to its type.

    num_layers: PositiveInt = 2                      # its bounds, in the terms of annotated-types
    prefix: Annotated[Path, POSITIONAL]              # how the command line takes it

The loader of recipes and options (convert.py) refuses values out of bounds, together with all other mistakes; sections
that are made in Python call `check_bounds`. Bounds that other fields decide are checked where these are known.
"""

import functools
import operator
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import BaseMetadata, Ge, Gt, Le, Lt

from megatron_tpt.errors import UserError

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
TokenId = Annotated[int, Ge(0), Lt(2**31)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
"""A factor that is applied again and again, or a share that is dropped."""

POSITIONAL = "positional"
"""Given on the command line without the name of the field."""
REPEATED = "repeated"
"""A list of lists: the option may be given several times, each time with several values."""
FLAT = "flat"
"""A section whose fields are options by their own names, without that of the section before them."""

_HOLDS: dict[str, Callable[[Any, Any], bool]] = {
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
}
_WORDS = {
    ("ge",): "be {} or more",
    ("gt",): "be above {}",
    ("ge", "le"): "be from {} to {}",
    ("ge", "lt"): "lie in [{}, {})",
    ("gt", "le"): "be above {} and at most {}",
}

hints_of: Callable[[type], dict[str, Any]] = functools.cache(functools.partial(get_type_hints, include_extras=True))
"""The annotations of a dataclass by field, with what they declare in addition to the type."""


@functools.cache
def plain(hint: Any) -> Any:
    """The type in an annotation, without its metadata."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def marks_of(hint: Any) -> tuple[Any, ...]:
    """The metadata of an annotation."""
    return getattr(hint, "__metadata__", ())


@functools.cache
def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of another type the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


@functools.cache
def bounds_of(hint: Any) -> tuple[tuple[str, Any], ...]:
    """(kind, limit) of every bound of a number, which may be one of several alternatives."""
    marks = [mark for one in alternatives(hint) for mark in marks_of(one) if isinstance(mark, BaseMetadata)]
    return tuple((kind, getattr(mark, kind)) for mark in marks for kind in _HOLDS if hasattr(mark, kind))


def bounds_in_words(hint: Any) -> str:
    """What the bounds of a field ask of its value, as in "be 1 or more"; empty where there are none."""
    bounds = bounds_of(hint)
    if not bounds:
        return ""
    words = _WORDS[tuple(kind for kind, _ in bounds)].format(*(limit for _, limit in bounds))
    names = [name for one in alternatives(hint) if get_origin(one) is Literal for name in get_args(one)]
    return ", or ".join([words, *names])


def bounds_missed(hint: Any, value: Any) -> str:
    """What the bounds of a field ask of its value, which does not meet them; empty where it does."""
    if value is None or isinstance(value, str):
        return ""
    holds = all(_HOLDS[kind](value, limit) for kind, limit in bounds_of(hint))
    return "" if holds else bounds_in_words(hint)


@functools.cache
def _bounded_fields(cls: type) -> tuple[tuple[str, Any], ...]:
    """The fields with bounds, and the annotation that has them: that of the items, where the field is a list."""
    items = ((name, get_args(hint)[0] if get_origin(hint) is list else hint) for name, hint in hints_of(cls).items())
    return tuple((name, hint) for name, hint in items if bounds_of(hint))


def out_of_bounds(name: str, value: Any, words: str) -> str:
    """The message for a value out of its bounds: "--limit 0: must be 1 or more", "model.num_layers=0 must ..."."""
    return f"{name} {value}: must {words}" if name.startswith("--") else f"{name}={value} must {words}"


def check_bounds(section: Any, prefix: str = "--") -> None:
    """Raise UserError when a field of a dataclass is out of the bounds that it is declared with. `prefix` is what is
    written before its name: "--" of an option, "training." of a section of a recipe."""
    cls: type = type(section)
    for name, hint in _bounded_fields(cls):
        value = getattr(section, name)
        for item in value if isinstance(value, list) else [value]:
            if words := bounds_missed(hint, item):
                shown = name.replace("_", "-") if prefix.startswith("--") else name
                raise UserError(out_of_bounds(f"{prefix}{shown}", item, words))
