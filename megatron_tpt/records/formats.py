"""Which files hold records, by their names: the kind of content and how it is packed. Case does not matter."""

import os
from pathlib import PurePath
from typing import Literal, NamedTuple

Kind = Literal["lines", "json", "parquet", "arrow"]
_KINDS: dict[str, Kind] = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"
}  # fmt: skip
PACKINGS = (".gz", ".zst", ".bz2", ".xz")
READ_NAMES = ".jsonl, .ndjson or .json, plain or packed as .gz, .zst, .bz2 or .xz; .parquet; .arrow"
"""The names that are read, for messages."""


class FileFormat(NamedTuple):
    """What a file holds."""

    kind: Kind
    """"json" is lines of JSON, or arrays of objects, or objects written over several lines."""
    packing: str
    """One of PACKINGS, or empty."""

    @property
    def is_table(self) -> bool:
        """Whether it has columns with types."""
        return self.kind in ("parquet", "arrow")

    @property
    def has_plain_lines(self) -> bool:
        """Whether a reader can begin at any newline of the file."""
        return self.kind == "lines" and not self.packing


def file_format(path: PurePath) -> FileFormat | None:
    """The format of a file by its name; None where it is none that is read."""
    rest, suffix = os.path.splitext(path.name.lower())
    packing = suffix if suffix in PACKINGS else ""
    if packing:
        suffix = os.path.splitext(rest)[1]
    kind = _KINDS.get(suffix)
    if kind is None or (packing and kind in ("parquet", "arrow")):
        return None
    return FileFormat(kind, packing)
