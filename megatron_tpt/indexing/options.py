"""The options of the indexing tools. Light to import: the help of a command line needs nothing else."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_tpt.config.fields import PositiveInt, check_bounds
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.join import Join
from megatron_tpt.records import OnBadRecord
from megatron_tpt.units import num_bytes

Backend = Literal["auto", "gigatoken", "reference"]


@dataclass(frozen=True)
class IndexOptions:
    """What to index, and how."""

    input: list[str | Path]
    """Files (.jsonl, .ndjson, .json, each plain or as .gz, .zst, .bz2, .xz; .parquet; .arrow), folders of them such as
    the output of tools/augment.py, patterns ("data/**/*.jsonl"), or data sets of the Hub (hf://owner/name?split=train).
    """
    tokenizer: Path
    """A Hugging Face tokenizer folder (tokenizer.json, tokenizer_config.json); it must name an
    end-of-sequence token.
    """
    output: Path
    """The prefix of the output: PREFIX.bin, PREFIX.idx and PREFIX.json."""
    text_column: str = "text"
    """The column with the document; several, as in "question,answer", are joined by a newline. "a.b" is the field b of
    the objects in column a."""
    id_column: str = "id"
    """The column with the record's name, for messages."""
    where: str | None = None
    """Index only the records whose `meta` meets this condition, such as "'alf' in strata" or "answer_tokens > 4096 and
    domain in ['math', 'code']"; docs/curation.md has the language. The others are counted."""
    join: Join = Join.document_thinking
    """How document and thinking make one sample. In all but document_only, raw text that holds a think tag never makes
    the tokens that mark thinking, whether the tokenizer has think tokens or not."""
    on_bad_record: OnBadRecord = "stop"
    """Stop at a record without usable text, or skip it and count it."""
    append_eos: bool = True
    """End every document with the end-of-sequence token."""
    sentences: bool = False
    """Make each sentence a sequence of its own; documents keep their bounds. For other programs: pre-training
    here takes whole documents and refuses such an index. Slow: sentences are found in Python."""
    parse_special_tokens: bool = False
    """Let special tokens and think tags that occur in the raw text become these tokens."""
    shard_size: str | None = None
    """Write PREFIX-00000-of-000NN.{bin,idx,json}, no .bin larger than this ("10GiB", "500MB")."""
    tokenizer_backend: Backend = "auto"
    """auto: gigatoken where it gives exactly the tokens of Hugging Face tokenizers, else these, with a warning.
    gigatoken: stop where it does not. reference: Hugging Face tokenizers.
    """
    num_workers: PositiveInt | None = None
    """Threads that parse and encode; by default as many as there are cores. One thread reads and unpacks, file after
    file; from .gz come some 200 MB/s, which two or three workers use up. For more, run a job for each part of the input
    and merge (tools/merge_index.py).
    """
    max_memory: str = "1GiB"
    """Limit of the memory in use, except for a single record larger than that allows. (Records of more than 256 MiB are
    bad records; the environment variable MEGATRON_TPT_MAX_RECORD_SIZE sets another limit.)"""

    def __post_init__(self) -> None:
        check_bounds(self)
        if num_bytes("--max-memory", self.max_memory) < MIN_MEMORY_BYTES:
            raise UserError(f"--max-memory {self.max_memory} is too little: give {MIN_MEMORY_BYTES >> 20}MiB or more")
        if self.shard_size is not None:
            num_bytes("--shard-size", self.shard_size)

    @property
    def worker_count(self) -> int:
        """Threads to use."""
        return self.num_workers or len(os.sched_getaffinity(0))


MIN_MEMORY_BYTES = 512 << 20


@dataclass(frozen=True)
class ConvertTokenizerOptions:
    """What to convert, and where to."""

    input: Path
    """A SentencePiece model (tokenizer.model, tokenizer.model.v3), a tiktoken file, a tekken.json, or the folder of
    one; the tokenizer's other files next to it are copied too."""
    output: Path
    """The folder to make: a Hugging Face tokenizer. It must not exist."""
    eos_token: str | None = None
    """The end-of-sequence token; what tokenizer_config.json or the SentencePiece model names when not given."""
    special_tokens: list[str] = field(default_factory=list)
    """Special tokens of a tiktoken tokenizer, in the order of their ids, which follow the last rank."""
    pattern: str | None = None
    """The regular expression by which a tiktoken tokenizer splits text into words; that of Llama 3 when not given."""
    sample: list[str | Path] = field(default_factory=list)
    """Documents (.jsonl, .parquet ...) to compare the two on; of all together the first thousand."""


@dataclass(frozen=True)
class TrainTokenizerOptions:
    """What to train a tokenizer on, and what it is to be."""

    input: list[str | Path]
    """Files (.jsonl, .json, packed or not, .parquet, .arrow), folders of them, patterns, or data sets of the Hub."""
    output: Path
    """The folder to make: a Hugging Face tokenizer. It must not exist."""
    text_column: str = "text"
    """The column with the document; several, as in "question,answer", are joined by a newline."""
    vocab_size: PositiveInt = 16384
    """Number of tokens: 256 bytes, the special tokens, and merges found in the input."""
    special_tokens: list[str] = field(default_factory=list)
    """More special tokens, in addition to <|endoftext|> (end of sequence), <|pad|>, <think> and </think>."""
    split_digits: bool = True
    """Make every digit its own token, so that numbers are read and written digit by digit."""
    chat_template: Path | None = None
    """A Jinja chat template to store with the tokenizer."""
