"""The options of tools/pack_sft.py. Light to import: the help of a command line needs nothing else."""

import datetime
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_tpt.config.fields import PositiveInt, check_bounds
from megatron_tpt.errors import UserError
from megatron_tpt.json_data import loads
from megatron_tpt.records import OnBadRecord

_BYTES_PER_WORKER = 4 << 20  # less is done before another process has started


@dataclass(frozen=True)
class PackOptions:
    """What to pack, and how."""

    input: list[str | Path]
    """Files (.jsonl, .ndjson, .json, each plain or as .gz, .zst, .bz2, .xz; .parquet; .arrow), folders of them, or
    patterns ("data/*.parquet")."""
    tokenizer: Path
    """The Hugging Face tokenizer folder to fine-tune with."""
    output: Path
    """The prefix of the output: PREFIX.bin, PREFIX.idx, PREFIX.sft, PREFIX.sft.json, and PREFIX.tokenizer with the chat
    template that was used."""
    sequence_length: PositiveInt
    """training.sequence_length of the fine-tuning."""
    where: str | None = None
    """Pack only the records whose `meta` meets this condition, such as "'shq' in strata"; docs/curation.md has the
    language. The others are counted."""
    messages_column: str | None = None
    """The column with the conversation, in any of the shapes of docs/chats.md; "messages" when not given. Where a
    record lacks that, the usual other columns are looked for: conversations, prompt and completion, instruction and
    output."""
    tools_column: str = "tools"
    """The column with the tools that a conversation may call, where there is one."""
    prompt_column: str | None = None
    """The column with the prompt, where the input has prompts and responses instead. To texts no chat template is
    applied, so options for conversations are refused; lists of messages are a conversation, of which only the response
    is learned."""
    response_column: str | None = None
    """The column with the response; with --prompt-column."""
    chat_template: Path | None = None
    """A file with a Jinja chat template to use instead of the tokenizer's. With {% generation %} spans these say what
    is learned; without, what follows the generation prompt is."""
    date: str | None = None
    """Today, as YYYY-MM-DD, for chat templates that write it (Llama 3.1 and later); refused for others."""
    chat_template_kwargs: str | None = None
    """Variables for the chat template of all conversations, as a JSON object: '{"enable_thinking": false}'. Those of a
    record's own column chat_template_kwargs come first."""
    inline_reasoning: bool = False
    """Write reasoning that the chat template does not read into the answers, between think tags; else such
    conversations are bad examples."""
    ignore_fields: list[str] = field(default_factory=list)
    """Fields of messages to ignore; else a message with a field that is not understood is a bad example."""
    on_too_long: Literal["skip", "truncate", "stop"] = "skip"
    """What to do with an example longer than a row: skip it and count it, truncate it, or stop."""
    on_bad_record: OnBadRecord = "stop"
    """Stop at a record that makes no example (bad fields, a loss mask of all ones or all zeros, what the chat template
    cannot show whole), or skip it and count it."""
    num_workers: PositiveInt | None = None
    """Processes that render and tokenise; when not given, as many as there are cores, fewer for small inputs. The
    output is the same whatever the number."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if (self.prompt_column is None) != (self.response_column is None):
            raise UserError("--prompt-column and --response-column need each other: give both, or neither")
        if self.prompt_column is not None and self.messages_column is not None:
            raise UserError("--messages-column: omit it with --prompt-column and --response-column")
        self.today()
        self.template_variables()

    def template_variables(self) -> dict[str, Any]:
        """The chat template's variables that were given."""
        if self.chat_template_kwargs is None:
            return {}
        try:
            value = loads(self.chat_template_kwargs)
        except ValueError as error:
            raise UserError(f"--chat-template-kwargs {self.chat_template_kwargs!r} is not JSON ({error})") from None
        if not isinstance(value, dict):
            raise UserError(f"--chat-template-kwargs {self.chat_template_kwargs!r} is not a JSON object")
        return value

    def today(self) -> datetime.date | None:
        """The date given, if any."""
        try:
            return None if self.date is None else datetime.date.fromisoformat(self.date)
        except ValueError:
            raise UserError(f"--date {self.date} is no date: write YYYY-MM-DD") from None

    def conversation_options(self) -> list[str]:
        """The options given that only concern conversations."""
        given = {
            "--chat-template": self.chat_template,
            "--date": self.date,
            "--chat-template-kwargs": self.template_variables(),
            "--tools-column": self.tools_column != "tools",
            "--inline-reasoning": self.inline_reasoning,
            "--ignore-fields": self.ignore_fields,
        }
        return [name for name, value in given.items() if value]

    @property
    def conversation_column(self) -> str:
        """The column with the conversation."""
        return self.messages_column or "messages"

    def worker_count(self, num_bytes: int) -> int:
        """Processes for an input of `num_bytes`."""
        return self.num_workers or min(len(os.sched_getaffinity(0)), max(1, num_bytes // _BYTES_PER_WORKER))
