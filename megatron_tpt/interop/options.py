"""The options of the interop tools. Light to import: the help of a command line needs nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ExportOptions:
    """Which checkpoint to export, and where to."""

    checkpoint: Path
    """A checkpoint folder, such as RUN/checkpoints/latest; any parallel layout may have written it."""
    output: Path
    """The folder to make: config.json, model*.safetensors and the tokenizer. It must not exist."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the exported weights; that of the checkpoint when not given."""


@dataclass(frozen=True)
class ImportOptions:
    """Which Hugging Face model to import, and where to."""

    model: Path
    """A Hugging Face folder: config.json, *.safetensors and tokenizer.json."""
    output: Path
    """The checkpoint folder to make, for training.init_from. It must not exist."""
