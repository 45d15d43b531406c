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


@dataclass(frozen=True)
class RetrofitOptions:
    """Which model to cut, where, and where to put the result."""

    model: Path
    """A Hugging Face folder, or a checkpoint folder of a Llama-like model."""
    output: Path
    """The checkpoint folder to make, for training.init_from. It must not exist."""
    split: str | None = None
    """Layers of prelude, recurrence and coda, such as 4,8,4: the first ones, those just before the coda, the last."""
    layers: str | None = None
    """The layers to take instead, in their order, by the model's own numbers from 0: as many as --split has."""
    adapter: Literal["random", "identity", "add"] | None = None
    """The new matrix that reads the state and the embeddings: random (the paper's, when not given), the embeddings
    alone (identity: one iteration is then the pruned model), or their sum (add)."""
    static: bool = False
    """Make the baseline: the same layers, passed once, without an adapter."""
    untie: bool = False
    """Only separate the output matrix from the embedding, and keep all layers."""
    seed: int | None = None
    """Of the random adapter; 0 when not given."""
