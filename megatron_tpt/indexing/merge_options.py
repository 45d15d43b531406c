"""The options of tools/merge_index.py. Light to import: the help of a command line needs nothing else."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class MergeOptions:
    """Which indices to merge, and where to."""

    output: Path
    """The prefix of the output: PREFIX.bin, PREFIX.idx and PREFIX.json."""
    input: list[str] = field(default_factory=list)
    """In this order: prefixes (data/a for data/a.bin, .idx and .json), globs in quotes ("data/shard-*"), folders (every
    index in them, by name).
    """
    list_file: Path | None = None
    """A file with more of these, one a line, after those of --input."""
    require_manifests: bool = True
    """Refuse indices without PREFIX.json, whose tokenizer and content nobody can check. Without them nothing but the
    structure is checked, and the result has no manifest either.
    """
    verify: bool = True
    """Compare each .bin with the checksum in its manifest while it is copied."""
