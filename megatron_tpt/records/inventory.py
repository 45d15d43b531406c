"""What a job recorded of its finished files, and whether they are still what it wrote.

    FOLDER/.inventory/task-00003.jsonl     a line for every file that task 3 finished: name, size, checksum, revision

Whoever reads a file of such a folder compares its size, which costs nothing, and its checksum where the whole file is
read or hashed anyway. A folder of an earlier version has no inventory; its files are read as they are.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_tpt.errors import UserError
from megatron_tpt.files import append_line, appended_lines, atomic_write, file_checksum
from megatron_tpt.names import counted, shown
from megatron_tpt.records.folders import REJECTS, listed

FOLDER = ".inventory"


@dataclass(frozen=True)
class Entry:
    """A finished file, or one that a job removed since nothing was left for it."""

    name: str
    """Relative to the folder: "part-00000-00001.jsonl.zst", "rejects/part-00000-00001.jsonl.zst"."""
    bytes: int | None
    """None where the job left no such file."""
    checksum: str = ""
    revision: int = 0
    """How often the file was rewritten: the highest one counts."""

    def __post_init__(self) -> None:
        texts, numbers = (self.name, self.checksum), (self.revision, self.bytes if self.bytes is not None else 0)
        if not (all(type(one) is str for one in texts) and all(type(one) is int for one in numbers)):
            raise TypeError(f"not what was recorded of a file: {self}")

    @classmethod
    def of(cls, folder: Path, name: str) -> "Entry":
        """The file as it is now."""
        path = folder / name
        if not path.exists():
            return cls(name, None)
        return cls(name, path.stat().st_size, file_checksum(path))

    def difference(self, num_bytes: int | None) -> str | None:
        """What is wrong with the file when its size is `num_bytes` (None: it is missing); None where nothing is."""
        if num_bytes == self.bytes:
            return None
        if num_bytes is None:
            return "is missing"
        was = "recorded no such file" if self.bytes is None else f"recorded {self.bytes:,}"
        return f"has {num_bytes:,} bytes, the job that wrote it {was}"


class Inventory:
    """All that was recorded in a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for path in sorted((folder / FOLDER).glob("*.jsonl")):
            for entry in appended_lines(path, Entry):
                if entry.name not in self.entries or entry.revision >= self.entries[entry.name].revision:
                    self.entries[entry.name] = entry

    def difference(self, name: str) -> str | None:
        """What is wrong with a file by its size; None where nothing is, or nothing was recorded."""
        entry = self.entries.get(name)
        return entry.difference(size_of(self.folder / name)) if entry is not None else None

    def content_difference(self, name: str) -> str | None:
        """As `difference`, by the content: the whole file is read."""
        entry, difference = self.entries.get(name), self.difference(name)
        if difference or entry is None or entry.bytes is None or file_checksum(self.folder / name) == entry.checksum:
            return difference
        return "holds something other than what the job that wrote it recorded"

    def differences(self) -> Iterator[tuple[str, str]]:
        """The files that are not as they were recorded, and how."""
        for name in self.entries:
            if (difference := self.difference(name)) is not None:
                yield name, difference

    def add(self, writer: str, names: Iterable[str]) -> None:
        """Record files as they are now, or that they are not there, in the file of `writer`: one process at a time."""
        for name in names:
            entry, before = Entry.of(self.folder, name), self.entries.get(name)
            if before is None and entry.bytes is None:
                continue
            entry = Entry(name, entry.bytes, entry.checksum, before.revision + 1 if before is not None else 0)
            append_line(inventory_path(self.folder, writer), json.dumps(asdict(entry)).encode())
            self.entries[name] = entry


def inventory_path(folder: Path, writer: str) -> Path:
    """Where `writer` records what it finishes in `folder`."""
    return folder / FOLDER / f"{writer}.jsonl"


def write_inventory(folder: Path, writer: str, entries: Iterable[Mapping[str, object]]) -> None:
    """Record files in place of all that `writer` recorded before; an entry as `asdict` gives it."""
    with atomic_write(inventory_path(folder, writer)) as temporary, temporary.open("wb") as file:
        file.writelines(json.dumps(entry).encode() + b"\n" for entry in entries)


def size_of(path: Path) -> int | None:
    """The size of a file, None where it is missing."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


class Inventories:
    """The inventories of all folders that files come from, each read once."""

    def __init__(self) -> None:
        self._by_folder: dict[Path, Inventory] = {}
        self._unrecorded: dict[Path, list[str]] = {}

    def check(self, file: Path) -> str:
        """The recorded checksum of a file (a real path), empty where none is. Raises UserError where the size differs
        from the recorded one."""
        inventory, name = self._inventory_of(file)
        if not inventory.entries:
            return ""
        if (difference := inventory.difference(name)) is not None:
            raise UserError(f"{shown(file)}: {difference}; {_advice(inventory.folder)}")
        if name not in inventory.entries:
            self._unrecorded.setdefault(inventory.folder, []).append(name)
            return ""
        return inventory.entries[name].checksum

    def require_all(self, folders: Iterable[Path], is_asked_for: Callable[[Path], bool]) -> None:
        """Raise UserError where a file of these folders was recorded, is asked for and is not there."""
        for folder in dict.fromkeys(folders):
            inventory = self._of(folder)
            gone = [
                entry.name
                for entry in inventory.entries.values()
                if entry.bytes is not None and is_asked_for(folder / entry.name) and not (folder / entry.name).exists()
            ]
            if gone:
                more = f" and {counted(len(gone) - 1, 'more file')}" if len(gone) > 1 else ""
                raise UserError(f"{shown(folder / min(gone))}{more}: missing; {_advice(folder)}")

    def notes(self) -> Iterator[str]:
        """A line for every folder with files that no job recorded there."""
        for folder, names in self._unrecorded.items():
            yield (
                f"{shown(folder)}: {counted(len(names), 'file')} not recorded by the job that wrote this folder (of an "
                f"earlier version?), read without a check: {listed(names)}"
            )

    def _inventory_of(self, file: Path) -> tuple[Inventory, str]:
        """The inventory that may know a file, which may be one of its folder's rejects, and the name there."""
        own = self._of(file.parent)
        above = self._of(file.parent.parent) if not own.entries and file.parent.name == REJECTS else own
        return above, str(file.relative_to(above.folder))

    def _of(self, folder: Path) -> Inventory:
        if folder not in self._by_folder:
            self._by_folder[folder] = Inventory(folder)
        return self._by_folder[folder]


def require_content(file: Path, checksum: str, recorded: str) -> None:
    """Raise UserError where a file was recorded with another checksum than it has."""
    if recorded and checksum != recorded:
        raise UserError(
            f"{shown(file)}: its content is not what the job that wrote it recorded (checksum {checksum}, not "
            f"{recorded}); {_advice(file.parent)}"
        )


def _advice(folder: Path) -> str:
    return (
        "run that job's command again, or restore the file; where it was changed on purpose, remove "
        f"{shown(folder / FOLDER)}{os.sep} to read the folder as it is"
    )
