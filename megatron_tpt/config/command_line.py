"""Command lines as nested mappings, with the place of every value: what a converter makes options or a recipe of."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_tpt.config.convert import did_you_mean, expand_path, is_list, is_optional, is_section
from megatron_tpt.config.fields import FLAT, POSITIONAL, REPEATED, hints_of, marks_of, plain
from megatron_tpt.config.renamed import names_of_before
from megatron_tpt.config.yaml_file import Key, before_message, dotted, load_yaml, place_of
from megatron_tpt.errors import UserError, failure

logger = logging.getLogger(__name__)

COMMAND_LINE = "command line"
"""The place of what is given there."""
RECIPE = "recipe"
"""The option of every tool that reads a file of options."""


def read_words(
    argv: Sequence[str], num_words: Callable[[str], int | None]
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The words that belong to no option, and the options (without their dashes) with their words, in their order.

    `num_words` says how many words an option takes; None: all up to the next option. `--option=WORD` takes this one.
    Raises UserError for an option without the word that it needs.
    """
    alone: list[str] = []
    options: list[tuple[str, list[str]]] = []
    rest = list(reversed(argv))
    while rest:
        argument = rest.pop()
        name, equals, word = argument[2:].partition("=")
        if not argument.startswith("-"):
            alone.append(argument)
            continue
        if not argument.startswith("--") or not name:
            raise UserError(f"{argument}: unknown; options begin with two dashes: see --help")
        words, most = ([word], 1) if equals else ([], num_words(name))
        while rest and not rest[-1].startswith("--") and (most is None or len(words) < most):
            words.append(rest.pop())
        if most == 1 and not words:
            raise UserError(f"{argument} lacks its value: write {argument}=VALUE")
        options.append((name, words))
    return alone, options


@dataclass(frozen=True)
class Option:
    """A field of a tool's options, as the command line knows it."""

    name: str
    """Without dashes before it: num-workers, filters.min-words."""
    key: tuple[str, ...]
    """Where its value is in the nested mappings."""
    hint: Any
    field: Field
    section: type
    """The dataclass that it is a field of."""

    @property
    def is_flag(self) -> bool:
        """Whether it is given without a value, or as --no-NAME."""
        return plain(self.hint) is bool

    @property
    def is_positional(self) -> bool:
        """Whether it is given without its name."""
        return POSITIONAL in marks_of(self.hint)

    @property
    def written(self) -> str:
        """Its name on the command line: --text-column, or INPUT where it is given without."""
        return self.name.upper() if self.is_positional else f"--{self.name}"

    @property
    def num_words(self) -> int | None:
        """How many words it takes; None: all up to the next option."""
        return 0 if self.is_flag else None if is_list(self.hint) else 1


def options_of(cls: type, prefix: str = "", key: tuple[str, ...] = ()) -> Iterator[Option]:
    """Every option of a tool whose options are a `cls`."""
    hints = hints_of(cls)
    for field in fields(cls):
        hint, dashed, own = hints[field.name], prefix + field.name.replace("_", "-"), (*key, field.name)
        if is_section(hint):
            yield from options_of(plain(hint), prefix if FLAT in marks_of(hint) else f"{dashed}.", own)
        else:
            yield Option(dashed, own, hint, field, cls)


class GivenOptions:
    """What a command line gives, and the files of options that it names: a later value replaces an earlier one."""

    def __init__(self, cls: type, argv: Sequence[str]) -> None:
        """Raises UserError for what is no command line, and for a file that cannot be read. A list that is given twice,
        of which only the last would count, is among the problems; of other options the last counts, and a line says so.
        """
        self.options = {option.name: option for option in options_of(cls)}
        for option in list(self.options.values()):
            for before, now in names_of_before(option.section).items():
                if option.key[-1] == now:
                    self.options[before.replace("_", "-")] = replace(option, key=(*option.key[:-1], before))
        self.content: dict[str, Any] = {}
        self.problems: list[str] = []
        self._places: dict[Key, str] = {}
        alone, given = read_words(argv, self._num_words)
        self._check_repeats(name for name, _ in given)
        for name, words in given:
            if name == RECIPE:
                self._read_file(expand_path(words[0]))
            else:
                self._take(name, words)
        for option in (option for option in self.options.values() if option.is_positional):
            if alone and is_list(option.hint):
                self._set(option.key, alone, COMMAND_LINE)
                alone = []
            elif alone:
                self._set(option.key, alone.pop(0), COMMAND_LINE)
        if alone:
            self.problems.append(f"{COMMAND_LINE}: {' '.join(alone)} belongs to no option: remove it, or see --help")

    def _find(self, name: str) -> Option | None:
        """The option that is written `name` or, of a flag, `no-name`."""
        name = name.replace("_", "-")
        positive = self.options.get(name.replace("no-", "", 1)) if "no-" in name else None
        option = self.options.get(name, positive if positive is not None and positive.is_flag else None)
        return None if option is None or option.is_positional else option

    def _num_words(self, name: str) -> int | None:
        option = self._find(name)
        return option.num_words if option is not None else 1 if name == RECIPE else None

    def _check_repeats(self, names: Iterator[str]) -> None:
        options = [option for option in map(self._find, names) if option is not None]
        for option, count in Counter(options).items():
            if count == 1 or REPEATED in marks_of(option.hint):
                continue
            if is_list(option.hint):
                self.problems.append(
                    f"{COMMAND_LINE}: --{option.name} is given {count} times: give it once, and all its values after it"
                )
            else:
                logger.info(f"note: --{option.name} is given {count} times; the last one counts")

    def _take(self, name: str, words: list[str]) -> None:
        option = self._find(name)
        if option is None:  # the converter refuses it, by its key
            key = tuple(name.replace("-", "_").split("."))
            is_in_section = (
                len(key) == 2 and isinstance(self.content.get(key[0], {}), dict) and self._is_section(key[0])
            )
            self._set(key if is_in_section else (name.replace("-", "_"),), words, COMMAND_LINE)
        elif option.is_flag:
            is_positive = name.replace("_", "-") in self.options
            self._set(option.key, words[0] if words else is_positive, COMMAND_LINE)
        elif is_list(option.hint):
            self._set(option.key, words, COMMAND_LINE, is_repeated=REPEATED in marks_of(option.hint))
        else:
            value = None if words == ["None"] and is_optional(option.hint) else words[0]
            self._set(option.key, value, COMMAND_LINE)

    def _is_section(self, name: str) -> bool:
        return any(option.key[0] == name and len(option.key) > 1 for option in self.options.values())

    def _set(self, key: tuple[str, ...], value: Any, place: str, *, is_repeated: bool = False) -> None:
        section = self.content
        for name in key[:-1]:
            section = section.setdefault(name, {})
        section[key[-1]] = [*section.get(key[-1], []), value] if is_repeated else value
        for known in [known for known in self._places if known[: len(key)] == key]:
            del self._places[known]
        self._places[key] = place

    def _read_file(self, path: Path) -> None:
        """Take the options in a YAML file; one without a value is not given."""
        try:
            content, places = load_yaml(path)
        except OSError as error:
            raise failure(f"--{RECIPE} {path}: cannot be read ({error.strerror})", error) from error
        if not isinstance(content, dict):
            raise UserError(f"{path}: a recipe is a list of options, as in `model: DIR`")
        self._take_mapping(content, (), places)

    def _take_mapping(self, content: dict[str, Any], inside: tuple[str, ...], places: dict[Key, str]) -> None:
        for name, value in content.items():
            written = (*inside, str(name))
            option = self._find(".".join(written))
            key = option.key if option is not None else tuple(part.replace("-", "_") for part in written)
            if isinstance(value, dict) and self._is_section(key[0]) and option is None:
                self._take_mapping(value, written, places)
            elif value is not None:
                is_repeated = option is not None and REPEATED in marks_of(option.hint)
                self._set(key, value, place_of(places, written), is_repeated=is_repeated)
                for place in [place for place in places if place[: len(written)] == written]:
                    self._places[key + place[len(written) :]] = places[place]

    def where(self, key: Key) -> str:
        """The place of a key, before a message; nothing for one that is not given."""
        return before_message(self._places, key)

    def name_of(self, key: Key) -> str:
        """A key as it is written: as an option, or with underscores in a file."""
        names = [name for name in key if isinstance(name, str)]
        option = next((option for option in self.options.values() if list(option.key) == names), None)
        if option is not None and option.is_positional:
            return option.written
        shown = names if option is None else [*option.name.replace("-", "_").split(".")[:-1], names[-1]]
        places = [part for part in key if isinstance(part, int)]
        return self._as_at(key, dotted((*shown, *places)))

    def suggest(self, key: Key) -> str:
        """What an unknown option may have been meant to be."""
        name = ".".join(map(str, key)).replace("_", "-")
        known = {option.name for option in self.options.values()}
        meant = did_you_mean(name, known, as_shown=lambda close: self._as_at(key, close))
        return meant or "; --help lists what is known"

    def _as_at(self, key: Key, name: str) -> str:
        """The name of an option, as it is written at the place of a key."""
        is_in_file = place_of(self._places, key) not in ("", COMMAND_LINE)
        return name.replace("-", "_") if is_in_file else f"--{name.replace('_', '-')}"
