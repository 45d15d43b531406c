"""The options of tools/inspect_index.py. Light to import: the help of a command line needs nothing else."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class InspectOptions:
    """What to look at in an index."""

    prefix: tyro.conf.Positional[Path]
    """The index: PREFIX.bin, PREFIX.idx and, where it is ours, PREFIX.json, or PREFIX.sft.json of a packed one."""
    document: int | None = None
    """Show this document, counted from 0, as text and tokens, thinking apart."""
    verify: bool = False
    """Read everything and check sizes, structure, counts, checksums and tokens; without manifest the first two."""
    compare: Path | None = None
    """Compare with this index, document by document: "identical", or the first difference and exit code 1."""
    tokenizer: Path | None = None
    """The tokenizer folder to show a document with; by default the one the manifest names."""
    json: bool = False
    """Print one JSON object instead of text."""
