"""The record files in a folder, links followed, and what else is there: nothing is omitted silently."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError, failure
from megatron_tpt.files import file_key, real_path
from megatron_tpt.json_data import read_json
from megatron_tpt.names import first_few, shown
from megatron_tpt.records.formats import file_format
from megatron_tpt.records.lines import LineReader, read_chunks
from megatron_tpt.records.parsing import NotAnObject, parse_object
from megatron_tpt.records.record import BadRecord, DamagedSource

REJECTS = "rejects"
"""The folder in a job's output for what it rejected, in the formats of records."""
_NAMES_SHOWN = 5
_MARK_OF_JOBS = "format_version"

OTHER_KIND = "of other kinds"
REJECTED = "of what a job rejected; name the folder to read it"
_SETTINGS = "taken for settings, a JSON object without 'text'; name the file to read it"
_HIDDEN = "hidden"
LOOP = "linked, but read already or a folder above"
_FOREIGN = "no part of the saved data set"


@dataclass
class Found:
    """What a folder or pattern holds."""

    files: list[Path] = field(default_factory=list)
    """To be read."""
    unread: dict[str, list[str]] = field(default_factory=dict)
    """Why -> names that are not read."""

    def omit(self, why: str, name: str) -> None:
        """Take note of a name that is not read."""
        self.unread.setdefault(why, []).append(name)

    def describe_unread(self) -> str:
        """What is not read, on one line: "2 names are not read: a.csv (of other kinds); .git/ (hidden)"."""
        if not self.unread:
            return ""
        count = sum(map(len, self.unread.values()))
        groups = "; ".join(f"{listed(names)} ({why})" for why, names in self.unread.items())
        return f"{count:,} {'name is' if count == 1 else 'names are'} not read: {groups}"


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return first_few(list(map(shown, sorted(names))), _NAMES_SHOWN)


def files_in(folder: Path) -> Found:
    """The record files in a folder at any depth, sorted. Links to folders are followed, each folder is read once.

    Hidden names and folders called "rejects" are not read. A folder that `save_to_disk` wrote is the files of that data
    set. Raises UserError for a link to nothing with the name of a record file, and for a folder that cannot be read.
    """
    found = Found()
    seen: set[tuple[int, int]] = set()
    links = [folder]
    while links:
        found_links: list[Path] = []
        for link in links:
            if link != folder and (file_key(link) in seen or real_path(folder).is_relative_to(real_path(link))):
                found.omit(LOOP, str(link.relative_to(folder)))
            else:
                found_links += _walk(folder, link, seen, found)
        links = sorted(found_links)
    found.files.sort()
    return found


def _walk(root: Path, top: Path, seen: set[tuple[int, int]], found: Found) -> Iterator[Path]:
    """Put what is below `top` into `found`. Yields links to folders, which are not followed."""

    def fail(error: OSError) -> None:
        raise failure(f"{shown(error.filename)}: cannot be read ({error.strerror})", error) from error

    for place, folders, names in os.walk(top, onerror=fail):
        folder = Path(place)
        seen.add(file_key(folder))
        if (saved := saved_dataset(folder)) is not None:
            own = {file.name for file in saved if file.parent == folder}
            found.files += saved
            folders.clear()
            names = [name for name in names if name not in own | _SAVED_DESCRIPTIONS]
            for name in names:
                found.omit(_FOREIGN, str((folder / name).relative_to(root)))
            continue
        for name in list(folders):
            path = folder / name
            if (why := _why_not_folder(name)) is not None:
                found.omit(why, f"{path.relative_to(root)}/")
                folders.remove(name)
            elif path.is_symlink():
                folders.remove(name)
                yield path
            elif file_key(path) in seen:  # by way of a link, or mounted twice
                found.omit(LOOP, str(path.relative_to(root)))
                folders.remove(name)
        for name in names:
            if (why := why_not_read(folder / name)) is not None:
                found.omit(why, str((folder / name).relative_to(root)))
            else:
                found.files.append(folder / name)


def _why_not_folder(name: str) -> str | None:
    return _HIDDEN if name.startswith(".") else REJECTED if name == REJECTS else None


def why_not_read(path: Path) -> str | None:
    """Why a file that was found, not named by the user, is not read; None where it is read.

    Raises UserError for a link to nothing that has the name of a record file.
    """
    if path.name.startswith("."):
        return _HIDDEN
    format = file_format(path)
    if format is None:
        return OTHER_KIND
    if not path.is_file():
        if path.is_symlink() and not path.exists():
            target = shown(os.readlink(path))
            raise UserError(
                f"{shown(path)}: a link to {target}, which is not there; fetch that file or remove the link"
            )
        return OTHER_KIND
    return _SETTINGS if format == ("json", "") and _holds_settings(path) else None


def _holds_settings(path: Path) -> bool:
    """Whether a .json file is a single object without a text, or with the mark of the files that jobs describe
    themselves in, or an array of something other than objects."""
    lines = LineReader(read_chunks(path, lambda _: None))
    values: list[Any] = []
    try:
        while len(values) < 2 and lines.has_rows():
            if (value := parse_object(lines.take())) is not None:
                values.append(value)
    except NotAnObject:
        return not values
    except (BadRecord, DamagedSource):
        return False  # which is said when it is read
    return len(values) == 1 and (not isinstance(values[0].get("text"), str) or _MARK_OF_JOBS in values[0])


_SAVED_DESCRIPTIONS = frozenset({"dataset_dict.json", "dataset_info.json", "state.json"})


def saved_dataset(folder: Path) -> list[Path] | None:
    """The files of a data set that was saved by `Dataset.save_to_disk`, None for any other folder."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = read_json(folder / "dataset_dict.json")["splits"]
            if len(splits) != 1:
                names = ", ".join(str(folder / split) for split in splits)
                raise UserError(f"{folder}: holds several splits; name one: {names}")
            return saved_dataset(_own_part(folder, splits[0]))
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            files = read_json(folder / "state.json")["_data_files"]
            return [_own_part(folder, file["filename"]) for file in files]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{folder}: its description as a saved data set is broken ({error!r}); save it again"
        ) from error
    return None


def _own_part(folder: Path, name: str) -> Path:
    """A file or folder that a saved data set names as a part of itself. Raises ValueError for a name, or a link, that
    leads anywhere but further into the folder: to the folder itself it would never end."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a file or folder in it")
    path = folder / name
    if real_path(folder) not in real_path(path).parents:
        raise ValueError(f"{name!r} is a link out of it")
    return path
