"""Documents with a question and an answer: from columns and conversations to records, and the parts of a record again.

    NAME=FILE:question,answer     the last column is the answer, those before it the question
    NAME=FILE:messages            a conversation; the answer begins with the assistant's first message
    NAME=FILE:text                a document, without an answer

The text of a record is question and answer joined by a newline; `meta.answer_begin` is the character at which the
answer begins. A conversation is kept in `meta.messages` as well, for tools/pack_sft.py.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_tpt.corpus.words import split_words
from megatron_tpt.indexing.chat_shapes import (
    REASONING_FIELDS,
    ChatColumns,
    Message,
    messages_in,
    read_messages,
    texts_of,
)
from megatron_tpt.indexing.chat_values import Unusable
from megatron_tpt.records.record import BadRecord, Record
from megatron_tpt.think_tags import CLOSE_TAG, OPEN_TAG

_SHOWN_CHARACTERS = 1 << 14
ANSWER_BEGIN = "answer_begin"
MESSAGES = "messages"
_TAGS = [(OPEN_TAG, CLOSE_TAG), ("<|begin_of_thought|>", "<|end_of_thought|>")]
"""What is around thoughts: the tags of most models, and those of OpenThoughts' prompt."""
_THOUGHT = re.compile("|".join(f"{re.escape(begin)}(.*?)(?:{re.escape(end)}|$)" for begin, end in _TAGS), re.DOTALL)


@dataclass(frozen=True)
class Document:
    """A record in the parts that annotators look at."""

    text: str
    """All of it."""
    question: str
    """What comes before the answer; empty of a document without one."""
    answer: str
    """The answer with its thinking; empty of a document without one."""
    thoughts: str
    """What is between think tags in the answer, or the record's own thinking."""
    has_answer: bool

    @cached_property
    def words(self) -> list[bytes]:
        """The first words of the text, see `split_words`: enough to say what it is about."""
        return split_words(self.text[:_SHOWN_CHARACTERS])

    @cached_property
    def answer_words(self) -> list[bytes]:
        """The same of the answer; of the text, where there is none."""
        return split_words(self.answer[:_SHOWN_CHARACTERS]) if self.has_answer else self.words

    @classmethod
    def of(cls, record: Record) -> "Document":
        """The parts of a record that `compose` made, or of any other."""
        begin = record.meta.get(ANSWER_BEGIN)
        if not isinstance(begin, int):
            return cls(record.text, "", "", record.thinking or "", False)
        answer = record.text[begin:]
        found = [text for groups in _THOUGHT.findall(answer) for text in groups if text]
        thoughts = [*found, record.thinking] if record.thinking else found
        return cls(record.text, record.text[:begin].removesuffix("\n"), answer, "\n".join(thoughts), True)


def compose(values: Sequence[Any], names: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The text of a record and what it adds to `meta`, from its columns. Raises BadRecord."""
    if len(values) == 1 and not isinstance(values[0], str):
        return _of_conversation(values[0], names[0])
    if len(values) == 1 and (messages := messages_in(values[0])) is not None:
        return _of_conversation(messages, names[0])
    for name, value in zip(names, values, strict=True):
        if value is None:
            raise BadRecord("no text", f"in column {name!r}")
        if not isinstance(value, str):
            raise BadRecord(f"column {name!r} is not a string", f"but {type(value).__name__}")
    if len(values) == 1:
        return values[0], {}
    question = "\n".join(values[:-1])
    if not values[-1] or values[-1].isspace():
        raise BadRecord("empty answer", f"in column {names[-1]!r}")
    return f"{question}\n{values[-1]}", {ANSWER_BEGIN: len(question) + 1}


def _of_conversation(value: Any, name: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, list):
        raise BadRecord("no text", f"in column {name!r}, which holds neither text nor messages")
    try:
        messages = read_messages(value, ChatColumns()).messages
    except Unusable as error:
        raise BadRecord(error.reason, error.detail) from None
    text = ""
    meta: dict[str, Any] = {MESSAGES: value}
    for message in messages:
        if message["role"] == "assistant" and ANSWER_BEGIN not in meta:
            meta[ANSWER_BEGIN] = len(text)
        text += f"{_shown(message)}\n"
    return text.removesuffix("\n"), meta


def _shown(message: Message) -> str:
    """A message as plain text: thoughts between think tags, texts, calls of tools as JSON."""
    thoughts = [message[name] for name in REASONING_FIELDS if message.get(name)]
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    texts = [text for text in texts_of(message) if text]
    return "\n".join([*(f"{OPEN_TAG}{text}{CLOSE_TAG}" for text in thoughts), *texts, *calls])
