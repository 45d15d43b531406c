"""The options of `tools/augment.py`. Light to import: the help of the command line needs nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_tpt.errors import UserError
from megatron_tpt.generation import Sampling

CLOSE_TAG = "</think>"


@dataclass(frozen=True)
class AugmentOptions:
    """Which documents to think about, which model does it, and how."""

    input: list[Path]
    """Files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet) or folders of them."""
    output: Path
    """The folder to fill with part-00000.jsonl.zst, part-00001.jsonl.zst, ... Shards that are there are skipped."""
    model: str
    """The model that thinks: a Hugging Face model folder, or a Hub id (owner/name)."""
    text_column: str = "text"
    """The column with the document; several, as in "question,answer", are joined by a newline."""
    id_column: str = "id"
    """The column with the record's id; without a column "id" the id is made from the content."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """Stop at a record without usable text, or leave it out and count it."""
    limit: int | None = None
    """Take only so many records."""
    prompt: Path | None = None
    """A template file with {document} where the document goes; by default the project's own prompt."""
    max_document_tokens: int = 2048
    """The model sees this much of a document, in its own tokens; the record keeps the full text."""
    max_new_tokens: int = 8192
    """Longest thinking, in tokens; longer ones are cut and marked `truncated`."""
    temperature: float = 0.6
    """Randomness of the thinking; 0 takes the likeliest token."""
    top_p: float = 0.9
    """Choose among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Every record gets its own seed from this one and its id."""
    records_per_shard: int = 1000
    """Records per output file. A shard is written when all its records are done; what a killed job loses is less
    with small shards.
    """
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model; "auto" is what its config.json says."""
    tensor_parallel_size: int = 1
    """Number of devices that share the model."""
    max_num_seqs: int | None = None
    """Most documents thought about at once; by default 256 on CPUs and vLLM's own choice on GPUs."""

    def __post_init__(self) -> None:
        self.sampling()
        for name in ("max_document_tokens", "records_per_shard", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 1 or more")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: must be 1 or more")

    def sampling(self) -> Sampling:
        """The sampling these options ask for."""
        return Sampling(self.temperature, self.top_p, self.max_new_tokens, stop=(CLOSE_TAG,), seed=self.seed)
