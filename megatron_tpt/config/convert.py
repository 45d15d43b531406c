"""Dataclasses from nested mappings, as YAML gives them: every mistake in them is found, not the first alone.

    converter = Converter(where=lambda key: "recipe.yaml:7: ", suggest=lambda key: "")
    recipe = converter.section(PretrainRecipe, raw, ())
    converter.problems                     # one line each: where, what is wrong, what to change

Values are taken as people write them: 1e4 for a whole number, a text where a list of texts is due, ~ in paths.
"""

import dataclasses
import datetime
import functools
import math
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_tpt.config.bounds import range_missed
from megatron_tpt.config.model import ModelConfig, config_class
from megatron_tpt.config.yaml_file import Key, dotted
from megatron_tpt.errors import UserError

WRONG = object()
"""What stands for a value that a problem was found in."""

_TOO_LARGE = 2**63  # for the whole numbers of torch and NumPy
_hints_of = functools.cache(get_type_hints)


def is_section(hint: Any) -> bool:
    """Whether a field of this type is a mapping with fields of its own."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def is_optional(hint: Any) -> bool:
    """Whether a field of this type may be left open."""
    return type(None) in get_args(hint)


def expected(hint: Any) -> str:
    """What a field of this type takes, in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}" if len(get_args(hint)) > 1 else str(get_args(hint)[0])
    if get_origin(hint) is list:
        return f"a list, of which each is {expected(get_args(hint)[0])}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(expected(one) for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is dict:
        return "a mapping"
    if is_section(hint):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(hint))}"
    return {Path: "a path", str: "a text", float: "a number", int: "a whole number", bool: "true or false"}[hint]


@dataclasses.dataclass
class Converter:
    """Builds dataclasses and collects what is wrong."""

    where: Callable[[Key], str]
    """What to write before a message about a key: the file and line, or nothing."""
    suggest: Callable[[Key], str]
    """What an unknown key may have been meant to be: "; did you mean ...?", or nothing."""
    problems: list[str] = dataclasses.field(default_factory=list)

    def section(self, cls: type, raw: Any, key: Key) -> Any:
        """A `cls` from a mapping; WRONG when a problem was found in it. One without content has the defaults."""
        if raw is None:
            raw = {}
        if not isinstance(raw, Mapping):
            return self._wrong(key, f"{_shown(raw)} is not {expected(cls)}")
        if issubclass(cls, ModelConfig):
            try:
                cls = config_class(raw)
            except UserError as error:
                self.problems.append(self._with_place(str(error), key))
                return WRONG
        hints, fields = _hints_of(cls), {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        num_problems = len(self.problems)
        for name, value in raw.items():
            own = (*key, str(name))
            if name in fields:
                values[name] = self.value(hints[name], value, own)
            else:
                self._wrong(own, f"unknown{self.suggest(own)}")
        for name, field in fields.items():
            is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if is_required and name not in raw:
                self._wrong(key, f"lacks {name}: give {expected(hints[name])}")
        if len(self.problems) > num_problems:
            return WRONG
        try:
            return cls(**values)
        except UserError as error:
            self.problems.append(self._with_place(str(error), key))
            return WRONG

    def _with_place(self, message: str, key: Key) -> str:
        """A message that begins with the name of a field, behind the place of the field."""
        named = re.match(r"(\w+)\.(\w+)", message)
        return self.where(named.groups() if named else key) + message

    def value(self, hint: Any, value: Any, key: Key) -> Any:
        """A value of type `hint`; WRONG when it is none."""
        if is_section(hint):
            if isinstance(value, str) and "path" in _hints_of(hint):
                value = {"path": value}
            return self.section(hint, value, key)
        if get_origin(hint) is list:
            return self._list(get_args(hint)[0], value, key)
        if get_origin(hint) is dict:
            return self._mapping(get_args(hint)[1], value, key)
        if hint is Any:
            return value
        if value is None and not is_optional(hint):
            return self._wrong(key, f"has no value: give {expected(hint)}, or remove it")
        others = [one for one in get_args(hint) if one is not type(None)]
        if value is not None and is_optional(hint) and len(others) == 1:
            return self.value(others[0], value, key)
        try:
            result = _scalar(hint, value)
        except ValueError as error:
            return self._wrong(key, f"{_shown(value)} is not {expected(hint)}{error}")
        if (words := range_missed(key, result)) is not None:
            return self._wrong(key, f"{_shown(value)} is out of range: it must be {words}")
        return result

    def _list(self, hint: Any, value: Any, key: Key) -> Any:
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list):
            return self._wrong(key, f"{_shown(value)} is not {expected(list[hint])}")
        return [self.value(hint, item, (*key, place)) for place, item in enumerate(value)]

    def _mapping(self, hint: Any, value: Any, key: Key) -> Any:
        """Names with values of one type; one without content is empty."""
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            return self._wrong(key, f"{_shown(value)} is not {expected(dict[str, hint])}")
        return {str(name): self.value(hint, item, (*key, str(name))) for name, item in value.items()}

    def _wrong(self, key: Key, problem: str) -> Any:
        self.problems.append(f"{self.where(key)}{dotted(key)}: {problem}")
        return WRONG


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _scalar(hint: Any, value: Any) -> Any:
    """A value of a type without parts. Raises ValueError, with what to add to the message, for another."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        notes = ""
        for one in get_args(hint):
            try:
                if one is not type(None):
                    return _scalar(one, value)
            except ValueError as error:
                notes = notes or str(error)
        raise ValueError(notes)
    if get_origin(hint) is Literal:
        value = "off" if value is False else value  # YAML takes the word for a truth value
        if value not in get_args(hint):
            raise ValueError("")
        return value
    return _OF_TYPE[hint](value)


def _whole_number(value: Any) -> int:
    number = _number(value)
    if not (isinstance(value, int) or number.is_integer()):
        raise ValueError("")
    if abs(number) >= _TOO_LARGE:
        raise ValueError(": it is too large")
    return value if isinstance(value, int) else int(number)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError("") from None
    if not math.isfinite(number):
        raise ValueError(": it is not finite" if math.isinf(number) else "")
    return number


def _truth(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError("")
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | datetime.date):
        raise ValueError(": write it in quotes" if isinstance(value, bool) else "")
    return str(value)


def _path(value: Any) -> Path:
    text = _text(value)
    if not text or "\0" in text:
        raise ValueError("")
    return expand_path(text)


def expand_path(text: str) -> Path:
    """A path whose ~ or ~USER, which a shell leaves alone after "=", stands for a home folder. Raises UserError for an
    unknown user's."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such home folder: write the whole path") from None


_OF_TYPE: dict[Any, Callable[[Any], Any]] = {
    int: _whole_number,
    float: _number,
    bool: _truth,
    str: _text,
    Path: _path,
}
