"""Checks that a job fits its output folder: its settings are stored there, so that a different job is refused, and its
input must not overlap with the folder.

The settings of a job are JSON. The entry "input" is a list of {"name", "fingerprint"}, one for each file or shard.
Files may be added to the input of a job: they come after the existing ones, whatever their names, so that finished work
stays valid. Such entries have "added": 1 for the files of the first addition, and so on.
"""

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.files import file_fingerprint, real_path, write_json
from megatron_tpt.json_data import read_json
from megatron_tpt.names import first_few
from megatron_tpt.records import Source
from megatron_tpt.records.patterns import matches

_SHOWN = 3
"""The number of names that a message lists."""
_MAX_VALUE = 60
"""Characters of a value that a message shows."""
_FILES_BY_NAME = ("files", "model_files")
"""Settings of the form {name of a file: its fingerprint}."""
_OF_PREFIX = ("{}.json", "{}.sft.json")
_IN_FOLDER = ("part-00000.jsonl.zst", "report.json")
"""Files written beside a prefix, or in an output folder, under names that could be read as records."""


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raise UserError when the folder of `path` holds anything but a run with these settings.

    Files added to the input are allowed (see `added_names`).
    """
    output = path.parent
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder for the output")
    before = read_settings(path)
    if before is None:
        if any(output.glob("part-*")):
            raise UserError(f"{output}: has shards but no {path.name}; choose another --output")
        return
    if _added(before, settings):
        before = before | {"input": settings["input"]}
    if differences := list(describe_changes(before, settings)):
        raise UserError(
            f"{output}: was started with other settings or input ({'; '.join(differences)}); "
            "restore them or choose another --output"
        )


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings of the run that `path` belongs to; None if there is none."""
    if not path.exists():
        return None
    try:
        settings = read_json(path)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); choose another --output") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not the settings of a job; choose another --output")
    return settings


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a run that starts in `path`, or its grown input (see `check_settings`)."""
    before = read_settings(path)
    if before is None or _added(before, settings):
        write_json(path, settings)


def added_names(path: Path, settings: dict[str, Any]) -> list[str]:
    """The names of the files that were added to the input of the run that `path` belongs to."""
    before = read_settings(path)
    return [entry["name"] for entry in _added(before, settings)] if before else []


def _added(before: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """The new entries of the input after the previous ones; none if these are not all present in their order."""
    old, new = _entries(before.get("input")), _entries(now.get("input"))
    return new[len(old) :] if old and new[: len(old)] == old else []


def in_job_order(path: Path, sources: Sequence[Source]) -> list[Source]:
    """`sources` in the order of the run that `path` belongs to: first those that it knows, then those that were added.

    Unchanged if a source that the run knows is missing, or if their order has changed.
    """
    recorded = _recorded_inputs(path)
    by_name = {source.name: source for source in sources}
    if not recorded.keys() <= by_name.keys():
        return list(sources)
    place = {name: i for i, name in enumerate(by_name)}
    places: dict[int, list[int]] = {}
    for name, entry in recorded.items():
        places.setdefault(entry.get("added", 0), []).append(place[name])
    if any(found != sorted(found) for found in places.values()):
        return list(sources)
    return [by_name[name] for name in recorded] + [source for source in sources if source.name not in recorded]


def describe_inputs(path: Path, sources: Sequence[Source]) -> list[dict[str, Any]]:
    """The entry "input" for the settings of the run that `path` belongs to, or starts.

    The fingerprint of a file uses the number of blocks from when the file was first seen, which depends on the number
    of files then.
    """
    recorded = _recorded_inputs(path)
    # Jobs of earlier versions do not record it.
    num_blocks_before = _num_blocks(sum("added" not in entry for entry in recorded.values()))
    addition = max((entry.get("added", 0) for entry in recorded.values()), default=0) + 1
    described = []
    for source in sources:
        new: dict[str, Any] = {"name": source.name, "blocks": _num_blocks(len(sources))}
        entry = recorded.get(source.name) or (new | {"added": addition} if recorded else new)
        blocks = entry.get("blocks", num_blocks_before)
        described.append(entry | {"fingerprint": file_fingerprint(source.path, blocks) if source.path else None})
    return described


def _num_blocks(num_sources: int) -> int:
    return max(64 // max(num_sources, 1), 2)


def _recorded_inputs(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of the input of a run, by name."""
    return {entry["name"]: entry for entry in _entries((read_settings(path) or {}).get("input"))}


def _entries(value: Any) -> list[dict[str, Any]]:
    """`value` if it is a list of named entries, such as an input; otherwise an empty list."""
    is_named = isinstance(value, list) and all(isinstance(entry, dict) and "name" in entry for entry in value)
    return value if is_named else []


def _files(value: Any) -> list[dict[str, Any]]:
    """The entries of files that are stored as {name: fingerprint}."""
    return [{"name": name, "fingerprint": each} for name, each in value.items()] if isinstance(value, dict) else []


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def describe_changes(
    before: dict[str, Any], now: dict[str, Any], prefix: str = "", *, as_text: Callable[[Any], str] = _as_json
) -> Iterator[str]:
    """The differences between settings, one phrase each: a setting with both values, or how files have changed."""
    for name in {**now, **before}:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name in _FILES_BY_NAME:
            yield f"{prefix}{name}: {EntryChanges(_files(old), _files(new)).describe()}"
        elif isinstance(old, dict) and isinstance(new, dict):
            yield from describe_changes(old, new, f"{prefix}{name}.", as_text=as_text)
        elif _entries(old) or _entries(new):
            yield f"{prefix}{name}: {EntryChanges(_entries(old), _entries(new)).describe()}"
        else:
            before_text, now_text = as_text(old), as_text(new)
            yield f"{prefix}{name} was {_short(before_text, now_text)}, now {_short(now_text, before_text)}"


class EntryChanges:
    """The differences between two lists of named entries, for example of files."""

    def __init__(self, before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> None:
        """An entry has a "name"; all other fields except "added" and "blocks" are its content."""
        self._old, self._new = ({entry["name"]: entry for entry in entries} for entries in (before, now))
        removed = [entry for name, entry in self._old.items() if name not in self._new]
        added = [entry for name, entry in self._new.items() if name not in self._old]
        by_content = {json.dumps(content): entry["name"] for entry in added if (content := _content(entry))}
        self.renamed = {
            entry["name"]: by_content.pop(text)
            for entry in removed
            if (text := json.dumps(_content(entry))) in by_content
        }
        """Old name: new name."""
        self.added = [entry["name"] for entry in added if entry["name"] not in self.renamed.values()]
        self.removed = [entry["name"] for entry in removed if entry["name"] not in self.renamed]
        common = [name for name in self._new if name in self._old]
        self.changed = [name for name in common if _content(self._new[name]) != _content(self._old[name])]

    @property
    def only_added(self) -> bool:
        """Whether all previous entries are unchanged and in the same order, and there are new ones."""
        is_rest_same = not (self.removed or self.renamed or self.changed)
        return is_rest_same and bool(self.added) and [n for n in self._new if n in self._old] == list(self._old)

    def describe(self) -> str:
        """The differences on one line; empty if there are none."""
        groups = [
            ("added", self.added),
            ("removed", self.removed),
            ("renamed", [f"{a} to {b}" for a, b in self.renamed.items()]),
            ("changed", [_describe_entry(self._old[name], self._new[name]) for name in self.changed]),
        ]
        phrases = ", ".join(describe_names(names, verb) for verb, names in groups if names)
        if phrases or list(self._old) == list(self._new):
            return phrases
        return f"the order was {first_few(list(self._old), _SHOWN)}, now {first_few(list(self._new), _SHOWN)}"


def describe_names(names: Sequence[str], verb: str) -> str:
    """`2 added (a.jsonl, b.jsonl)`: the number, and the first few names."""
    return f"{len(names):,} {verb} ({first_few(names, _SHOWN)})"


def _content(entry: dict[str, Any]) -> dict[str, Any]:
    """The fields of an entry that describe its content."""
    return {key: value for key, value in entry.items() if key not in ("name", "added", "blocks") and value is not None}


def _describe_entry(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The name of a changed entry, with the changes unless only a fingerprint can have changed."""
    if set(_content(before)) | set(_content(now)) <= {"fingerprint"}:
        return str(now["name"])
    return f"{now['name']}: {'; '.join(describe_changes(_content(before), _content(now)))}"


def _short(text: str, compared: str) -> str:
    """A value on one line; for a long value the part around the first difference."""
    if len(text) <= _MAX_VALUE:
        return text
    differing = (i for i, (a, b) in enumerate(zip(text, compared, strict=False)) if a != b)
    begin = max(next(differing, len(compared)) - _MAX_VALUE // 2, 0)
    end = begin + _MAX_VALUE
    return "..." * (begin > 0) + text[begin:end] + "..." * (end < len(text))


def require_apart(
    output: Path, inputs: Sequence[str | Path], files: Iterable[Path], *, is_prefix: bool = False
) -> None:
    """Raise UserError if the next run would read files written to `output` as input, or if they would replace input.

    `output` is a folder, or with `is_prefix` the prefix of the files that are written. `inputs` are as the user gave
    them, `files` are the files that are read. Links are followed.
    """
    folder = real_path((output.parent if is_prefix else output).expanduser())
    names = [name.format(output.name) for name in _OF_PREFIX] if is_prefix else _IN_FOLDER
    written = [folder / name for name in names]
    for text in map(str, inputs):
        if _reads(text, folder, written):
            raise UserError(
                f"--output {output}: is inside the input {text}, so that the next run would read it as input; "
                "choose an --output outside the input"
            )
    for file in files:
        real = real_path(file)
        if real in written if is_prefix else real.is_relative_to(folder):
            raise UserError(f"--output {output}: the input file {file} is inside it; choose another --output")


def require_absent(output: Path) -> None:
    """Raise UserError when something is in the place of an output that is only made anew."""
    if os.path.lexists(output):
        raise UserError(f"{output} exists; choose another --output or remove it")


def _reads(text: str, folder: Path, written: Sequence[Path]) -> bool:
    """Whether the input `text` includes `folder` or the files that are `written` to it."""
    if is_url := text.startswith("hf://"):
        text = text.removeprefix("hf://").partition("?")[0]  # may be a folder, too
    path = Path(text).expanduser()
    if path.is_dir():
        return any(folder.is_relative_to(read) for read in _real_folders(real_path(path)))
    if is_url or path.exists() or not glob.has_magic(text):
        return False
    num_plain = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
    base, pattern = real_path(Path(*path.parts[:num_plain])), path.parts[num_plain:]
    return any(
        place.is_relative_to(base) and matches(place.relative_to(base).parts, pattern)
        for place in (*folder.parents, folder, *written)
    )


def _real_folders(folder: Path) -> Iterator[Path]:
    """The real path of a folder, and of those that links in it lead to, at any depth."""
    waiting, seen = [folder], set[Path]()
    while waiting:
        root = waiting.pop()
        if root in seen:
            continue
        seen.add(root)
        yield root
        if root != folder and folder.is_relative_to(root):
            continue  # a link to a parent of `folder`: do not walk the rest of it
        for place, names, _ in os.walk(root):
            waiting += [real_path(link) for link in (Path(place, name) for name in names) if link.is_symlink()]
