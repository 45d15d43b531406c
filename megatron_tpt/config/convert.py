"""Dataclasses from nested mappings, as YAML and command lines give them: the one validator of recipes and of options.

    converter = Converter(where=lambda key: "recipe.yaml:7: ", suggest=lambda key: "")
    recipe = converter.section(PretrainRecipe, raw, ())
    converter.raise_problems()             # one line each: where, what is wrong, what to change

Every mistake is found, not only the first. Values are taken as people write them: 1e4 for a whole number, a text where
a list of texts is due, ~ in paths; all of them may be texts, as on a command line.
"""

import dataclasses
import datetime
import difflib
import enum
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from megatron_tpt.config.fields import alternatives, bounds_missed, hints_of, out_of_bounds, plain
from megatron_tpt.config.model import ModelConfig, config_class
from megatron_tpt.config.renamed import names_of_before, value_of_now
from megatron_tpt.config.yaml_file import Key, dotted, place_of
from megatron_tpt.errors import UserError

WRONG = object()
"""Marks a value that a problem was found in."""

_TOO_LARGE = 2**63  # for the whole numbers of torch and NumPy


@functools.cache
def is_section(hint: Any) -> bool:
    """Whether a field of this type is a mapping with fields of its own."""
    return isinstance(plain(hint), type) and dataclasses.is_dataclass(plain(hint))


@functools.cache
def is_list(hint: Any) -> bool:
    """Whether a field of this type takes several values."""
    return get_origin(plain(hint)) in (list, tuple)


@functools.cache
def is_mapping(hint: Any) -> bool:
    """Whether a field of this type takes names of a user's own, each with a value."""
    return get_origin(plain(hint)) is dict


@functools.cache
def is_optional(hint: Any) -> bool:
    """Whether a field of this type may be None."""
    return type(None) in alternatives(plain(hint))


@functools.cache
def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values of a type that lists them; none for another."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return tuple(one.value for one in hint)
    return get_args(hint) if get_origin(hint) is Literal else ()


def is_required(field: dataclasses.Field) -> bool:
    """Whether a field must be given."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def expected(hint: Any) -> str:
    """What a field of this type takes, in words."""
    hint = plain(hint)
    if choices := choices_of(hint):
        return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0])
    if is_list(hint):
        return f"a list, of which each is {expected(get_args(hint)[0])}"
    if is_mapping(hint):
        return "a mapping"
    if is_section(hint):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(hint))}"
    if len(alternatives(hint)) > 1:
        return " or ".join(expected(one) for one in alternatives(hint) if one is not type(None))
    return {Path: "a path", str: "a text", float: "a number", int: "a whole number", bool: "true or false"}[hint]


@dataclasses.dataclass
class Converter:
    """Builds dataclasses and collects what is wrong."""

    where: Callable[[Key], str]
    """What to write before a message about a key: the file and line, or nothing."""
    suggest: Callable[[Key], str] | None = None
    """What an unknown key may have been meant to be: "; did you mean ...?", or nothing. Without it, all that are known
    there are named."""
    name_of: Callable[[Key], str] = dotted
    """A key as it was written: data.train[0].weight, --num-workers."""
    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    """What is accepted now, and will not be in the next release."""

    def raise_problems(self) -> None:
        """Raise UserError with all that is wrong, each problem once; do nothing where nothing is."""
        if self.problems:
            raise UserError("\n".join(dict.fromkeys(self.problems)))

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
        hints, fields = hints_of(cls), {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        num_problems = len(self.problems)
        for written, value in raw.items():
            own, name = (*key, str(written)), self._name_of_now(cls, raw, key, str(written))
            if name in fields:
                values[name] = self.value(hints[name], self._value_of_now(cls, name, value, own), own)
            else:
                hint = f"; known there: {', '.join(fields)}" if self.suggest is None else self.suggest(own)
                self._wrong(own, f"unknown{hint}")
        for name, field in fields.items():
            if is_required(field) and name not in values:
                self._lacks(key, name, hints[name])
        if len(self.problems) > num_problems:
            return WRONG
        try:
            return cls(**values)
        except UserError as error:
            self.problems.append(self._with_place(str(error), key))
            return WRONG

    def _name_of_now(self, cls: type, raw: Mapping, key: Key, written: str) -> str:
        """The name that a field has now; with a warning, where it was written under that of before."""
        name = names_of_before(cls).get(written)
        if name is None:
            return written
        before = self.name_of((*key, written))
        now = f"--{name.replace('_', '-')}" if before.startswith("--") else name
        if name in raw:
            self._wrong((*key, written), f"is called {now} now, and that is given too: remove one of them")
        else:
            self._renamed((*key, written), before, now)
        return name

    def _value_of_now(self, cls: type, name: str, value: Any, key: Key) -> Any:
        now = value_of_now(cls, name, value)
        if now != value:
            self._renamed(key, f"{self.name_of(key)}: {value}", str(now))
        return now

    def _renamed(self, key: Key, before: str, now: str) -> None:
        self.warnings.append(f"{self.where(key)}{before} is called {now} now; the next release knows the new name only")

    def _lacks(self, key: Key, name: str, hint: Any) -> None:
        if key:
            self._wrong(key, f"lacks {name}: give {expected(hint)}")
        else:
            self.problems.append(f"{self.where((name,))}{self.name_of((name,))} is missing: give {expected(hint)}")

    def _with_place(self, message: str, key: Key) -> str:
        """A message that begins with the name of a field, behind the place of the field."""
        named = re.match(r"(\w+)\.(\w+)|--([\w-]+)", message)
        names = (name.replace("-", "_") for name in named.groups() if name) if named else key
        return self.where(tuple(names)) + message

    def value(self, hint: Any, value: Any, key: Key) -> Any:
        """A value of type `hint`; WRONG when it is none."""
        if is_section(hint):
            if isinstance(value, str) and "path" in hints_of(plain(hint)):
                value = {"path": value}
            return self.section(plain(hint), value, key)
        if is_list(hint):
            return self._list(plain(hint), value, key)
        if is_mapping(hint):
            return self._mapping(get_args(plain(hint))[1], value, key)
        if hint is Any:
            return value
        if value is None and not is_optional(hint):
            return self._wrong(key, f"has no value: give {expected(hint)}, or remove it")
        others = [one for one in alternatives(plain(hint)) if one is not type(None)]
        if value is not None and is_optional(hint) and len(others) == 1:
            return self.value(others[0], value, key)
        try:
            result = _scalar(hint, value)
        except ValueError as error:
            return self._wrong(key, f"{_shown(value)} is not {expected(hint)}{error}")
        if words := bounds_missed(hint, result):
            return self._out_of_bounds(key, value, words)
        return result

    def _list(self, hint: Any, value: Any, key: Key) -> Any:
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list):
            return self._wrong(key, f"{_shown(value)} is not {expected(hint)}")
        items = (self.value(get_args(hint)[0], item, (*key, place)) for place, item in enumerate(value))
        return get_origin(hint)(items)

    def _mapping(self, hint: Any, value: Any, key: Key) -> Any:
        """Names with values of one type; one without content is empty."""
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            return self._wrong(key, f"{_shown(value)} is not {expected(dict[str, hint])}")
        return {str(name): self.value(hint, item, (*key, str(name))) for name, item in value.items()}

    def _out_of_bounds(self, key: Key, value: Any, words: str) -> Any:
        self.problems.append(f"{self.where(key)}{out_of_bounds(self.name_of(key), value, words)}")
        return WRONG

    def _wrong(self, key: Key, problem: str) -> Any:
        name = self.name_of(key)
        self.problems.append(f"{self.where(key)}{name}{': ' if name else ''}{problem}")
        return WRONG


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def from_yaml[T](kind: type[T], content: Any, places: Mapping[Key, str], path: Path) -> T:
    """What load_yaml has read from a file, as a dataclass or a list or mapping of such. Raises UserError for all that
    is wrong in it, each with its line."""
    converter = Converter(lambda key: f"{place_of(places, key) or path}: ")
    result = converter.value(kind, content, ())
    converter.raise_problems()
    return result


def from_json[T](cls: type[T], content: Any) -> T:
    """A dataclass from JSON that a program of this package has written, and somebody may have changed.

    Raises ValueError, with all that is wrong, where the fields or their types are not those of `cls`.
    """
    converter = Converter(where=lambda key: "", suggest=lambda key: "")
    result = converter.section(cls, content, ())
    if converter.problems:
        raise ValueError("; ".join(converter.problems))
    return result


def _scalar(hint: Any, value: Any) -> Any:
    """A value of a type without parts. Raises ValueError, with what to add to the message, for another."""
    hint = plain(hint)
    if len(alternatives(hint)) > 1:
        if value is None:
            return None
        notes = ""
        for one in alternatives(hint):
            try:
                if one is not type(None):
                    return _scalar(one, value)
            except ValueError as error:
                notes = notes or str(error)
        raise ValueError(notes)
    if choices := choices_of(hint):
        value = "off" if value is False else value  # YAML reads the word as a boolean
        if value not in choices:
            raise ValueError("")
        return hint(value) if isinstance(hint, type) else value
    return _OF_TYPE[hint](value)


def _whole_number(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,30}\s*", value):
        value = int(value)
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


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.7, as_shown: Callable[[str], str] = str) -> str:
    """What to write behind "unknown": the known name that is most like `name`; nothing where none is."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {as_shown(close[0])}?" if close else ""


def expand_path(text: str) -> Path:
    """A path whose ~ or ~USER, which a shell leaves alone after "=", names a home folder. Raises UserError for an
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
