"""The options of tools/inspect_index.py. Light to import: the help of a command line needs nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_tpt.config.fields import POSITIONAL
from megatron_tpt.errors import UserError


@dataclass(frozen=True)
class InspectOptions:
    """What to look at in an index."""

    prefix: Annotated[Path, POSITIONAL]
    """The index: PREFIX.bin, PREFIX.idx and, where it is ours, PREFIX.json, or PREFIX.sft.json of a packed one."""
    document: int | None = None
    """Show this document, counted from 0, as text and tokens: thinking apart, or of a row of a packed index its
    examples, with what is learned in color on a terminal and between ⟦ and ⟧ elsewhere."""
    verify: bool = False
    """Read everything and check sizes, structure, counts, checksums and tokens; without manifest the first two."""
    compare: Path | None = None
    """Compare with this index, document by document: "identical", or the first difference and exit code 1."""
    tokenizer: Path | None = None
    """With --document: the tokenizer folder to show it with; by default the one in PREFIX.tokenizer, or that the
    manifest names."""
    json: bool = False
    """Print one JSON object instead of text."""

    def __post_init__(self) -> None:
        modes = {
            "--document": self.document is not None,
            "--verify": self.verify,
            "--compare": self.compare is not None,
        }
        given = [name for name, is_given in modes.items() if is_given]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} do different things: give one at a time")
        if self.tokenizer is not None and self.document is None:
            raise UserError("--tokenizer is to show a document with: add --document N, or omit it")
