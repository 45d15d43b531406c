"""YAML files whose every key is known by its line, so that a mistake can be shown where it is.

file = read_yaml_file(Path("recipe.yaml"))
file.content                                  # nested mappings and lists
file.places["training", "num_steps"]          # "recipe.yaml:7"
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_tpt.errors import UserError
from megatron_tpt.json_data import MAX_NESTING

MAX_BYTES = 32 << 20
MAX_VALUES = 500_000
"""How many keys and items a file may hold, those that its aliases repeat included: these grow without limit. The recipe
in a checkpoint has six for each index file, of which a run may have tens of thousands."""
_LARGE = 1 << 18

Key = tuple[str | int, ...]
"""A place in nested mappings and lists: ("data", "train", 0, "weight")."""


@dataclass
class YamlFile:
    """What a YAML file holds, and where."""

    content: dict[str, Any]
    places: dict[Key, str] = field(default_factory=dict)
    """FILE:LINE of every key of a mapping and every item of a list."""


def load_yaml(path: Path) -> tuple[Any, dict[Key, str]]:
    """What a YAML file holds, and the places in it; None for an empty one.

    Raises UserError for what is not YAML, for two equal keys in one mapping, each with its line, and for a file that is
    too large or nested too deeply; OSError when the file cannot be read.
    """
    if (num_bytes := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path} has {num_bytes:,} bytes, and at most {MAX_BYTES:,} are read: give a recipe or list")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): give a YAML file") from None
    try:
        loader = _loader_of(text, path)
        try:
            node = loader.get_single_node()
            reader = _PlaceReader(path)
            if node is not None:
                reader.visit(node, ())
            if reader.duplicates:
                raise UserError("\n".join(reader.duplicates))
            return None if node is None else loader.construct_document(node), reader.places
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise UserError(f"{place} is not YAML: {_what_is_wrong(error)}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: more than {MAX_NESTING} levels") from None
    except ValueError as error:  # a date that is none
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _what_is_wrong(error: yaml.YAMLError) -> str:
    """What PyYAML says, without the places in its own words: it does not know the file."""
    words = [getattr(error, name, None) for name in ("context", "problem")]
    return " ".join(", ".join(word for word in words if word).split()) or " ".join(str(error).split())


def _loader_of(text: str, path: Path) -> Any:
    """PyYAML's loader for a text, which has the better messages; for a large one, written by a program, that of
    libyaml, if it is there: for thousands of sources the other takes tens of seconds. libyaml's would crash at a deep
    nesting, for which UserError is raised here."""
    fast: Any = getattr(yaml, "CSafeLoader", None)
    if len(text) < _LARGE or fast is None:
        return yaml.SafeLoader(text)
    depth = 0
    for event in yaml.parse(text, fast):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_NESTING:
            line = event.start_mark.line + 1 if event.start_mark is not None else 1
            raise UserError(f"{path}:{line} is nested too deeply: more than {MAX_NESTING} levels")
    return fast(text)


def read_yaml_file(path: Path) -> YamlFile:
    """Read a recipe: a file that holds one mapping. Raises UserError as load_yaml does, and when there is none."""
    try:
        content, places = load_yaml(path)
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}: give the path of a YAML file") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} must be a mapping of sections (model:, training:, ...)")
    return YamlFile(content, places)


class _PlaceReader:
    """Notes the line of every key, and keys that a mapping has twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[Key, str] = {}
        self.duplicates: list[str] = []
        self.num_visited = 0

    def visit(self, node: yaml.Node, key: Key) -> None:
        """Note what is below a node. Raises UserError for too many values, and too many in each other."""
        self.num_visited += 1
        if self.num_visited > MAX_VALUES or len(key) > MAX_NESTING:
            what = f"{MAX_VALUES:,} values" if self.num_visited > MAX_VALUES else f"{MAX_NESTING} levels"
            raise UserError(f"{self.path}:{node.start_mark.line + 1}: more than {what}, aliases included: use fewer")
        if isinstance(node, yaml.MappingNode):
            lines: dict[Any, int] = {}
            for name_node, value in node.value:
                name, line = name_node.value, name_node.start_mark.line + 1
                own = (*key, name) if isinstance(name, str) else key
                if isinstance(name, str) and name in lines and name_node.tag != "tag:yaml.org,2002:merge":
                    self.duplicates.append(
                        f"{self.path}:{line}: {dotted(own)} is there twice (line {lines[name]} has the first): put all "
                        f"of it into one"
                    )
                lines[name if isinstance(name, str) else id(name_node)] = line
                self.places[own] = f"{self.path}:{line}"
                self.visit(value, own)
        elif isinstance(node, yaml.SequenceNode):
            for place, item in enumerate(node.value):
                self.places[*key, place] = f"{self.path}:{item.start_mark.line + 1}"
                self.visit(item, (*key, place))


def dotted(key: Key) -> str:
    """A key as it is written on the command line and in messages: data.train[0].weight."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def place_of(places: Mapping[Key, str], key: Key) -> str:
    """The place of a key or, where it is not known, of what it is in; "" for none."""
    return next((places[key[:end]] for end in range(len(key), 0, -1) if key[:end] in places), "")


def before_message(places: Mapping[Key, str], key: Key) -> str:
    """The place of a key as a message begins with it; nothing where it is not known."""
    place = place_of(places, key)
    return f"{place}: " if place else ""
