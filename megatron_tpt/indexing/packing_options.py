"""The options of tools/pack_sft.py. Light to import: the help of a command line needs nothing else."""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_tpt.errors import UserError


@dataclass(frozen=True)
class PackOptions:
    """What to pack, and how."""

    input: list[Path]
    """Files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet) or folders of them."""
    tokenizer: Path
    """The Hugging Face tokenizer folder to fine-tune with."""
    output: Path
    """The prefix of the output: PREFIX.bin, PREFIX.idx, PREFIX.sft and PREFIX.sft.json."""
    sequence_length: int
    """training.sequence_length of the fine-tuning."""
    messages_column: str = "messages"
    """The column with the conversation: a list of {"role", "content"[, "reasoning_content"]}, the roles being system,
    user, assistant and tool."""
    prompt_column: str | None = None
    """The column with the prompt, where the input has prompts and responses instead; no chat template is applied."""
    response_column: str | None = None
    """The column with the response; with --prompt-column."""
    chat_template: Path | None = None
    """A file with a Jinja chat template to use instead of the tokenizer's. With {% generation %} spans these say what
    is learned; without, what follows the generation prompt is."""
    date: str | None = None
    """Today, as YYYY-MM-DD, for chat templates that write it (Llama 3.1 and later)."""
    on_too_long: Literal["skip", "truncate", "stop"] = "skip"
    """What to do with an example longer than a row: leave it out and count it, cut its end off, or stop."""
    on_bad_example: Literal["stop", "skip"] = "stop"
    """Stop at a record that makes no example (bad fields, a loss mask of all ones or all zeros, what the chat template
    cannot show whole), or leave it out and count it."""

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise UserError(f"--sequence-length {self.sequence_length} must be 1 or more")
        if (self.prompt_column is None) != (self.response_column is None):
            raise UserError("--prompt-column and --response-column go together: give both, or neither")
        if self.prompt_column is not None and (self.chat_template is not None or self.date is not None):
            raise UserError("--chat-template and --date are for conversations: leave them out with --prompt-column")
        self.today()

    def today(self) -> datetime.date | None:
        """The date given, if any."""
        try:
            return None if self.date is None else datetime.date.fromisoformat(self.date)
        except ValueError:
            raise UserError(f"--date {self.date} is no date: write YYYY-MM-DD") from None
