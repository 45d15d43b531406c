"""Journals: what a job has done, a line of JSON for each, added as it happens and read when the job is resumed.

A journal has one writer at a time. A line counts when it is whole, with its newline, and so are all before it: a crash
truncates no other line than the last, and the next writer cuts the file where the part that counts ends. (A file to
which writers add after a crash without reading it is another matter: see `files.append_line`.)
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """A line of a journal and its place in the file, in bytes."""

    fields: dict[str, Any]
    begin: int
    end: int


def read_journal(path: Path) -> Iterator[Entry]:
    """The entries that count, none where there is no file."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                fields = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                fields = None
            if not isinstance(fields, dict):
                return
            begin, end = end, end + len(line)
            yield Entry(fields, begin, end)


def encode(entries: Iterable[dict[str, Any]]) -> bytes:
    """Entries as lines. Escaped, so that whatever a value holds comes back as it was."""
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def append(descriptor: int, path: Path, lines: bytes) -> None:
    """Add `lines` to a journal that is open for appending, with one system call: kill -9 comes before it or after it.

    Raises OSError where there is no room for all of them; what was written of them does not count, if none follows.
    """
    if os.write(descriptor, lines) != len(lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
