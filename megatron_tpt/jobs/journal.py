"""Journals: append-only files with one JSON line per finished item, read when the job is resumed.

A journal has one writer at a time. A line is valid if it is complete, with its newline, and all lines before it are
valid: a crash can only truncate the last line, and the next writer truncates the file after the last valid line. (For
files that are appended to after a crash without being read, see `files.append_line`.)
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """A line of a journal and its position in the file, in bytes."""

    fields: dict[str, Any]
    begin: int
    end: int


def read_journal(path: Path) -> Iterator[Entry]:
    """The valid entries; none if there is no file."""
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
    """Entries as lines. Non-ASCII characters are escaped, so that every value is read back unchanged."""
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def append(descriptor: int, path: Path, lines: bytes) -> None:
    """Add `lines` to a journal that is open for appending, with one system call, so that kill -9 cannot split them.

    Raises OSError if the disk is full; a partial line is invalid, provided that nothing is appended after it.
    """
    if os.write(descriptor, lines) != len(lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
