"""The options of the indexing tools. Light to import: the help of a command line needs nothing else."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from megatron_tpt.indexing.join import Join


@dataclass(frozen=True)
class IndexOptions:
    """What to index, and how."""

    input: list[Path]
    """Files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet) or folders of them, such as the output of
    tools/augment.py.
    """
    tokenizer: Path
    """A Hugging Face tokenizer folder (tokenizer.json, tokenizer_config.json); it must name an
    end-of-sequence token.
    """
    output: Path
    """The prefix of the output: PREFIX.bin, PREFIX.idx and PREFIX.json."""
    text_column: str = "text"
    """The column with the document; several, as in "question,answer", are joined by a newline."""
    id_column: str = "id"
    """The column with the record's name, for messages."""
    join: Join = Join.document_thinking
    """How document and thinking make one sample."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """Stop at a record without usable text, or leave it out and count it."""


@dataclass(frozen=True)
class InspectOptions:
    """What to look at in an index."""

    prefix: tyro.conf.Positional[Path]
    """The index: PREFIX.bin, PREFIX.idx and, where it is ours, PREFIX.json."""
    document: int | None = None
    """Show this document, counted from 0, as text and tokens."""
    verify: bool = False
    """Read everything and check sizes, structure, counts, checksums and tokens."""
    tokenizer: Path | None = None
    """The tokenizer folder to show a document with; by default the one the manifest names."""


@dataclass(frozen=True)
class TrainTokenizerOptions:
    """What to train a tokenizer on, and what it is to be."""

    input: list[Path]
    """Files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet) or folders of them."""
    output: Path
    """The folder to make: a Hugging Face tokenizer. It must not exist."""
    text_column: str = "text"
    """The column with the document; several, as in "question,answer", are joined by a newline."""
    vocab_size: int = 16384
    """Number of tokens: 256 bytes, the special tokens, and merges found in the input."""
    special_tokens: list[str] = field(default_factory=list)
    """More special tokens, besides <|endoftext|> (end of sequence), <|pad|>, <think> and </think>."""
    split_digits: bool = True
    """Give every digit a token of its own, so that numbers are read and written digit by digit."""
    chat_template: Path | None = None
    """A Jinja chat template to store with the tokenizer."""
