"""Conversations, and pairs of prompt and response, as tokens of which only the assistant's are learned.

A conversation goes through the tokenizer's chat template. What is learned of a turn is what the model has to write: the
text that follows the generation prompt, up to the token that ends the turn. The prompt is proven to be what the model
is given at inference, token by token. Templates with `{% generation %}` spans say themselves what is learned.

Message contents are text: a special token's name in them is spelt out, never the token, so that no message can end its
own turn. That holds for tools, calls and reasoning too. The think tags in an assistant's content do mean the tags,
since that is where reasoning data keeps them.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.chat_checks import require_shown
from megatron_tpt.indexing.chat_forms import forms, reasoning_of, with_reasoning_apart, with_reasoning_inline
from megatron_tpt.indexing.chat_program import TemplateError
from megatron_tpt.indexing.chat_rendering import Rendered
from megatron_tpt.indexing.chat_shapes import (
    REASONING_FIELDS,
    Chat,
    ChatColumns,
    Message,
    one_is_text,
    read_chat,
    read_messages,
    texts_of,
)
from megatron_tpt.indexing.chat_template import ESCAPED_MARKS, MARKS, ChatTemplate, Encoded
from megatron_tpt.indexing.chat_values import Unusable, messages_in, present, text_of
from megatron_tpt.indexing.raw_tags import RawTags
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.think_tags import CLOSE_TAG


@dataclass(frozen=True)
class Example:
    """What the model sees at once, and which of it is learned."""

    tokens: numpy.ndarray
    """Token ids, int32 [n]."""
    has_loss: numpy.ndarray
    """Whether a token is learned, bool [n]; never the first, which nothing predicts."""


@dataclass(frozen=True)
class BadExample:
    """A record that makes no example."""

    reason: str
    """The same for all of its kind, to count by."""
    detail: str
    """What is wrong with this one."""

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


class ExampleFormat(Protocol):
    """How the fields of a record become examples."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that make an example."""

    def choose_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Which columns to read of a table that has `names`."""

    def encode_batch(self, records: Sequence[Mapping[str, Any]]) -> list[list[Example] | BadExample]:
        """The examples of every record, one or more, or what is wrong with it."""

    def take_notes(self) -> Counter[str]:
        """What of the records since the last call had no effect, in words, with the number of records."""


class PairFormat:
    """Prompt, response and the end-of-sequence token, with no template; the loss is on the last two.

    Where both are lists of messages, or JSON of such, they are a conversation, and `chats` encodes it; only the
    response is learned. Without, `no_chats` says why they are bad examples. Texts are bad examples when `for_chats`
    names options that were given and have no effect on them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_column: str,
        response_column: str,
        chats: "ConversationFormat | None" = None,
        for_chats: Sequence[str] = (),
        no_chats: str = "only texts are read here: pack conversations (tools/pack_sft.py)",
    ) -> None:
        self.columns = (prompt_column, response_column)
        self._tokenizer = tokenizer
        self._raw_tags = RawTags(tokenizer.tag_spellings())
        self._chats = chats
        self._for_chats = for_chats
        self._no_chats = no_chats
        self._notes: Counter[str] = Counter()

    def choose_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """The two columns, and the additional ones of a conversation."""
        extra = self._chats.extra if self._chats is not None else ()
        chosen = (*self.columns, *(name for name in extra if name in names and name not in self.columns))
        self._notes.update(_unread(name for name in names if name not in chosen))
        return chosen

    def take_notes(self) -> Counter[str]:
        """What of the records since the last call had no effect, in words, with the number of records."""
        notes, self._notes = self._notes, Counter()
        return notes + self._chats.take_notes() if self._chats is not None else notes

    def encode_batch(self, records: Sequence[Mapping[str, Any]]) -> list[list[Example] | BadExample]:
        """The examples of every record, or what is wrong with it."""
        read = [self._read(record) for record in records]
        chats = [record for record, is_chat in read if is_chat]
        found: list[list[Example] | BadExample] = [BadExample("messages, not texts", self._no_chats)] * len(chats)
        encoded = iter(found if self._chats is None else self._chats.encode_pairs(chats, self.columns))
        return [next(encoded) if is_chat else self._encode(record) for record, is_chat in read]

    def _read(self, record: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
        """A record, its columns as lists where they are messages, and whether they are."""
        values = {name: messages_in(record.get(name)) for name in self.columns}
        return (record, False) if None in values.values() else ({**record, **values}, True)

    def _encode(self, record: Mapping[str, Any]) -> list[Example] | BadExample:
        try:
            if sum(messages_in(record.get(name)) is not None for name in self.columns) == 1:
                raise Unusable("no messages", one_is_text(*self.columns))
            prompt, response = (_checked(text_of(record.get(name), name), name) for name in self.columns)
            if self._for_chats:
                names = ", ".join(self._for_chats)
                raise Unusable("no messages", f"to texts no chat template is applied: omit {names}")
        except Unusable as error:
            return BadExample(error.reason, error.detail)
        self._notes.update(_unread(name for name in record if name not in self.columns and present(record[name])))
        ids = self._raw_tags.spell_out_text(self._tokenizer.encode_batch([prompt])[0])
        tokens = numpy.array([*ids, *self._tokenizer.encode_tagged(response), self._tokenizer.eos_id])
        return _examples([(tokens, numpy.arange(len(tokens)) >= len(ids))])


class ConversationFormat:
    """Conversations through a chat template, in any of the shapes of docs/chats.md.

    With `inline_reasoning`, reasoning that the template does not read is written into the content, between think tags.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, columns: ChatColumns | str, inline_reasoning: bool = False
    ) -> None:
        self._columns = ChatColumns(columns) if isinstance(columns, str) else columns
        self.columns = (self._columns.messages,)
        self._tokenizer = tokenizer
        self._template = template
        self._reasoning_field = next((name for name in REASONING_FIELDS if template.mentions(name)), None)
        self._inline_reasoning = inline_reasoning
        self._notes: Counter[str] = Counter()

    @property
    def extra(self) -> tuple[str, ...]:
        """Columns that are read in addition to the conversation."""
        return self._columns.extra

    def choose_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of a table's columns that can be part of a conversation. Raises UserError when there is none."""
        chosen = tuple(name for name in self._columns.all if name in names)
        if not set(chosen) - set(self.extra):
            raise UserError(
                f"no column {self._columns.messages!r}; its columns are {', '.join(names)}: name the one with the "
                f"conversation (--messages-column)"
            )
        self._notes.update(_unread(name for name in names if name not in chosen))
        return chosen

    def take_notes(self) -> Counter[str]:
        """What of the records since the last call had no effect, in words, with the number of records."""
        notes, self._notes = self._notes, Counter()
        return notes

    def encode_batch(self, records: Sequence[Mapping[str, Any]]) -> list[list[Example] | BadExample]:
        """The examples of every record, or what is wrong with it."""
        return self._encode_all([self._rendered(record, lambda r: read_chat(r, self._columns)) for record in records])

    def encode_pairs(
        self, records: Sequence[Mapping[str, Any]], columns: tuple[str, str]
    ) -> list[list[Example] | BadExample]:
        """The same of prompts and responses that are messages."""
        as_one = replace(self._columns, messages="messages")

        def read(record: Mapping[str, Any]) -> Chat:
            prompt, response = (record[name] for name in columns)
            renamed = {**record, "messages": [*prompt, *response]}
            chat = read_chat(renamed, as_one)
            learned = read_messages(renamed["messages"], as_one, len(prompt)).learned
            shift = len(chat.messages) - len(renamed["messages"])  # a system message of its own column
            return replace(chat, learned=[number + shift for number in learned], used=(*chat.used, *columns))

        return self._encode_all([self._rendered(record, read) for record in records])

    def _rendered(self, record: Mapping[str, Any], read: Any) -> list[Rendered] | BadExample:
        try:
            chat = read(record)
            if not chat.learned:
                raise Unusable(
                    "nothing to learn", "no message of the assistant is to be learned: its mask would be all zeros"
                )
            rendered = self._render(chat)
        except TemplateError as error:
            return BadExample("unfit for the chat template", str(error))
        except Unusable as error:
            return BadExample(error.reason, error.detail)
        except RecursionError:
            return BadExample("nested too deep", "its fields are nested too deep")
        unread = _unread(name for name in record if name not in chat.used and present(record[name]))
        self._notes.update([*unread, *chat.notes])
        return rendered

    def _render(self, chat: Chat) -> list[Rendered]:
        """The texts of a conversation, in the first form that the template takes."""
        for name in chat.template_kwargs:
            if not self._template.reads(name):
                raise TemplateError(f"it reads no variable {name!r} of {self._columns.template_kwargs}")
        if chat.tools and not self._template.reads("tools"):
            raise TemplateError(f"it reads no tools, which {self._columns.tools!r} gives (--chat-template)")
        for number, message in enumerate(chat.messages, start=1):
            if "tool_calls" in message and not self._template.mentions("tool_calls"):
                raise TemplateError(
                    f"it reads no 'tool_calls', which message {number} has: give one that does (--chat-template)"
                )
        chats = [self._spelt_out(chat)]
        if self._reasoning_field is not None:
            chats.insert(0, self._spelt_out(with_reasoning_apart(chat, self._reasoning_field)))
        elif any(message.get(name) for message in chat.messages for name in REASONING_FIELDS):
            chats.insert(0 if self._inline_reasoning else 1, with_reasoning_inline(chats[0]))
        first: TemplateError | None = None
        with_parts = self._template.mentions("text")
        candidates = (form for one in chats for form in forms(one, with_parts=with_parts))
        for note, form in candidates:
            try:
                rendered = self._template.render(
                    form.messages,
                    form.learned,
                    tools=form.tools,
                    variables=form.template_kwargs,
                    reasoning=reasoning_of(form),
                )
                require_shown(rendered, form)
            except TemplateError as error:
                first = first or error
                continue
            if note:
                self._notes[note] += 1
            self._note_special_tokens(chat)
            self._note_unread_fields(chat)
            return rendered
        assert first is not None
        raise first

    def _note_special_tokens(self, chat: Chat) -> None:
        """Note the special tokens that an answer names: who writes them out in a content expects them to be tokens."""
        for number in chat.learned:
            for text in texts_of(chat.messages[number]):
                for name in self._template.special_names(text):
                    self._notes[f"the special token {name!r} in the content of an assistant message is text"] += 1

    def _note_unread_fields(self, chat: Chat) -> None:
        for name in ("name", "tool_call_id"):
            if not self._template.mentions(name) and any(name in message for message in chat.messages):
                self._notes[f"the chat template does not read {name!r} of messages"] += 1
        if self._columns.tools != ChatColumns().tools and not chat.tools:
            self._notes[f"no tools in column {self._columns.tools!r}"] += 1

    def _spelt_out(self, chat: Chat) -> Chat:
        """The conversation with the names of special tokens marked, and reasoning where the template looks for it."""
        messages = []
        for number, message in enumerate(chat.messages, start=1):
            where = f"of message {number}"
            reasoning = {name: text for name in REASONING_FIELDS if (text := message.get(name)) is not None}
            keep_tags = message["role"] == "assistant" and not any(reasoning.values())
            given = {name: value for name, value in message.items() if name not in reasoning}
            shown = self._spell(given, where, keep_tags=keep_tags)
            for name, text in reasoning.items():
                thoughts = self._spell(text, f"{name} {where}", keep_tags=False)
                self._add_reasoning(shown, name, thoughts, number)
            messages.append(shown)
        return replace(
            chat,
            messages=messages,
            tools=self._spell(chat.tools, "of the tools", keep_tags=False),
            template_kwargs=self._spell(chat.template_kwargs, f"of {self._columns.template_kwargs}", keep_tags=False),
        )

    def _add_reasoning(self, message: Message, name: str, thoughts: str, number: int) -> None:
        field = name if self._template.mentions(name) else self._reasoning_field
        if field is None and thoughts and not self._inline_reasoning and not self._template.mentions(CLOSE_TAG):
            raise TemplateError(
                f"it reads no reasoning, which message {number} has under {name!r}: write it into the answers with "
                f"--inline-reasoning, or give a template that reads it (--chat-template)"
            )
        message[field or name] = thoughts

    def _spell(self, value: Any, where: str, *, keep_tags: bool) -> Any:
        """`value` with the special tokens' names in all its strings marked."""
        if isinstance(value, str):
            return self._template.spell_out(_checked(value, f"text {where}"), keep_tags=keep_tags)
        if isinstance(value, Mapping):
            return {
                self._spell(str(key), where, keep_tags=False): self._spell(
                    item, where, keep_tags=keep_tags and key in ("content", "text")
                )
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._spell(item, where, keep_tags=keep_tags) for item in value]
        return value

    def _encode_all(self, rendered: Sequence[list[Rendered] | BadExample]) -> list[list[Example] | BadExample]:
        texts = [one for record in rendered if isinstance(record, list) for one in record]
        encoded = self._template.encode_batch([one.text for one in texts])
        prompts = [[turn.prompt_end for turn in one.turns if turn.prompt_end is not None] for one in texts]
        wholes = [(one.text, tokens, ends) for one, tokens, ends in zip(texts, encoded, prompts, strict=True)]
        counts = iter(zip(texts, encoded, self._template.count_prompt_tokens(wholes), strict=True))
        return [
            record if isinstance(record, BadExample) else _masked(list(itertools.islice(counts, len(record))))
            for record in rendered
        ]


def _unread(columns: Iterable[str]) -> list[str]:
    return [f"column {name!r} is not read" for name in columns]


def _checked(text: str, name: str) -> str:
    if any(mark in text for mark in (*MARKS, *ESCAPED_MARKS)):
        raise Unusable("no Unicode text", f"{name} holds a code point that is no character (U+FDD0 or U+FDD1)")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Unusable("no Unicode text", f"{name} holds half a surrogate pair") from None
    return text


def _masked(parts: Sequence[tuple[Rendered, Encoded, list[int | None]]]) -> list[Example] | BadExample:
    """The examples of one record."""
    masked = []
    for (_, turns, more_spans), encoded, counts in parts:
        if None in counts:
            return BadExample(
                "unfit for the chat template",
                "an answer's first characters make one token with the end of the generation prompt: strip the answer",
            )
        has_loss = encoded.overlaps(sorted([*more_spans, *(span for turn in turns for span in turn.spans)]))
        for count, turn in zip(counts, (turn for turn in turns if turn.prompt_end is not None), strict=True):
            assert count is not None and turn.prompt_end is not None
            # A special token may have taken up blanks that the answer begins with: it is the prompt's nevertheless.
            has_loss[:count] &= encoded.ends[:count] <= turn.prompt_end
        masked.append((encoded.tokens, has_loss))
    return _examples(masked)


def _examples(masked: Sequence[tuple[numpy.ndarray, numpy.ndarray]]) -> list[Example] | BadExample:
    examples = []
    for tokens, has_loss in masked:
        if not has_loss[1:].any():
            return BadExample("nothing to learn", "its loss mask would be all zeros: no token of it is the assistant's")
        if has_loss.all():
            return BadExample("nothing but answers", "its loss mask would be all ones: it has no prompt")
        has_loss[0] = False
        examples.append(Example(tokens.astype(numpy.int32), has_loss))
    return examples
