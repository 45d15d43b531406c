"""Documents with a question and an answer: from columns and conversations to records, and the parts of a record again.

    NAME=FILE:question,answer             the last column is the answer, those before it the question
    NAME=FILE:question,thoughts+answer    the answer begins with the thoughts of another column, between think tags
    NAME=FILE:messages                    a conversation; the answer begins with the assistant's first message
    NAME=FILE:text                        a document, without an answer

The text of a record is question and answer joined by a newline; `meta.answer_begin` is the character at which the
answer begins. A conversation is kept in `meta.messages` as well, for tools/pack_sft.py.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_tpt.indexing.chat_shapes import (
    REASONING_FIELDS,
    ChatColumns,
    Message,
    read_chat,
    texts_of,
)
from megatron_tpt.indexing.chat_values import Unusable, messages_in, present
from megatron_tpt.records.parsing import field_at, kind_of
from megatron_tpt.records.record import ANSWER_BEGIN, BadRecord, Record, question_and_answer
from megatron_tpt.think_tags import CLOSE_TAG, OPEN_TAG

_SHOWN_CHARACTERS = 1 << 12
_TAGS = [(OPEN_TAG, CLOSE_TAG), ("<|begin_of_thought|>", "<|end_of_thought|>")]
"""What is around thoughts: the tags of most models, and those of OpenThoughts' prompt."""
_END_OF_TAG = "think>"
"""In both tags: most texts have none."""
_THOUGHT = re.compile("|".join(f"{re.escape(begin)}(.*?)(?:{re.escape(end)}|$)" for begin, end in _TAGS), re.DOTALL)


@dataclass(frozen=True)
class Document:
    """A record in the parts that annotators look at."""

    text: str
    """All of it, but for the record's own thinking."""
    question: str = ""
    """What comes before the answer; empty of a document without one."""
    answer: str = ""
    """The answer with the thoughts in it; empty of a document without one."""
    thinking: str = ""
    """The record's own thinking, a field of its own."""
    has_answer: bool = False

    @cached_property
    def beginnings(self) -> tuple[str, str, str]:
        """Those of the question, of the answer, or of the text where there is none, and of the record's thinking."""
        parts = (self.question, self.answer if self.has_answer else self.text, self.thinking)
        question, answer, thinking = (part[:_SHOWN_CHARACTERS] for part in parts)
        return question, answer, thinking

    @cached_property
    def beginning(self) -> str:
        """The beginnings of question and answer, or of the text, without think tags: enough to say what it is about."""
        question, answer, _ = self.beginnings
        text = f"{question}\n{answer}" if self.has_answer else answer
        return text.replace(CLOSE_TAG, "").replace(OPEN_TAG, "") if _END_OF_TAG in text else text

    @property
    def thoughts(self) -> str:
        """What is between think tags in the answer, or in the text where there is none. A generated answer often lacks
        the first tag, which was part of the prompt."""
        text = self.answer if self.has_answer else self.text
        if not any(tag in text for tags in _TAGS for tag in tags):  # of most texts; looking for tags is slower
            return ""
        for begin, end in _TAGS if self.has_answer else ():
            before, found, _ = text.partition(end)
            if found and begin not in before:
                text = begin + text
        return "\n".join(thought for groups in _THOUGHT.findall(text) for thought in groups if thought)

    @classmethod
    def of(cls, record: Record) -> "Document":
        """The parts of a record that a `Composer` made, or of any other."""
        thinking = record.thinking or ""
        parts = question_and_answer(record.text, record.meta)
        if parts is None:
            return cls(record.text, thinking=thinking)
        return cls(record.text, *parts, thinking, has_answer=True)


@dataclass(frozen=True)
class Composer:
    """Makes the text of a record and what it adds to `meta` from the columns of a data set (see `Columns.compose`)."""

    has_thoughts: bool = False
    """Whether the last column but one holds the thoughts of the answer."""
    ignored_fields: frozenset[str] = frozenset()
    """Fields of messages that need not be understood."""

    def __call__(self, fields: Mapping[str, Any], names: Sequence[str]) -> tuple[str, dict[str, Any]]:
        """Text and additions to `meta`. Raises BadRecord."""
        values = [field_at(fields, name) for name in names]
        if len(names) == 1 and not (isinstance(values[0], str) and messages_in(values[0]) is None):
            return self._of_conversation(fields, values[0], names[0])
        for name, value in zip(names, values, strict=True):
            if isinstance(value, str) or (value is None and self.has_thoughts and name == names[-2]):
                continue
            if value is None:
                raise BadRecord("no text", f"in column {name!r}")
            raise BadRecord(f"column {name!r} is not a string", f"but {kind_of(value)}")
        if len(names) == 1:
            return values[0], {}
        *questions, answer = values
        if not answer or answer.isspace():
            raise BadRecord("empty answer", f"in column {names[-1]!r}")
        thoughts = questions.pop() if self.has_thoughts else None
        if thoughts and not thoughts.isspace():
            answer = f"{OPEN_TAG}{thoughts}{CLOSE_TAG}\n{answer}"
        question = "\n".join(questions)
        return f"{question}\n{answer}", {ANSWER_BEGIN: len(question) + 1}

    def _of_conversation(self, fields: Mapping[str, Any], value: Any, name: str) -> tuple[str, dict[str, Any]]:
        given = messages_in(value)
        if not given:
            raise BadRecord("no text", f"in column {name!r}, which holds neither text nor messages")
        columns = ChatColumns(name, ignored_fields=self.ignored_fields)
        extra = {column: fields[column] for column in columns.extra if present(fields.get(column))}
        try:
            messages = read_chat({name: given, **extra}, columns).messages
        except Unusable as error:
            raise BadRecord(error.reason, error.detail) from None
        text = ""
        meta: dict[str, Any] = {"messages": given, **extra}
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
