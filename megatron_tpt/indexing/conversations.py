"""Conversations, and pairs of prompt and response, as tokens of which only the assistant's are learned.

A conversation goes through the tokenizer's chat template. Which of the text is the assistant's is said by the
template's `{% generation %}` spans; where it has none, by rendering the conversation up to each assistant message with
the generation prompt, and again with the message. Both must be beginnings of the whole text, the first one token by
token: then the model learns to write what follows the prompt that it will be given.

Message contents are text: a special token's name in them is spelt out, never the token, so that no message can end its
own turn. The think tags in an assistant's content do mean the tags, since that is where reasoning data keeps them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy

from megatron_tpt.indexing.chat_template import MARKS, ChatTemplate, Encoded, Message, Rendered, TemplateError
from megatron_tpt.indexing.raw_tags import RawTags
from megatron_tpt.indexing.tokenizer import CLOSE_TAG, OPEN_TAG, Tokenizer

ROLES = ("system", "user", "assistant", "tool")


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
        return f"{self.reason} ({self.detail})"


class ExampleFormat(Protocol):
    """How the fields of a record become an example."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that are read."""

    def encode_batch(self, records: Sequence[Mapping[str, Any]]) -> list[list[Example] | BadExample]:
        """The examples of every record, or what is wrong with it."""

    def take_notes(self) -> Counter[str]:
        """What of the records since the last call had no effect, in words, with the number of records."""


class _Unusable(Exception):
    """Ends the work on one record; `bad` says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.bad = BadExample(reason, detail)


class PairFormat:
    """Prompt, response and the end-of-sequence token, with no template; the loss is on the last two."""

    def __init__(self, tokenizer: Tokenizer, prompt_column: str, response_column: str) -> None:
        self.columns = (prompt_column, response_column)
        self._tokenizer = tokenizer
        self._raw_tags = RawTags(tokenizer.tag_spellings())

    def encode_batch(self, records: Sequence[Mapping[str, Any]]) -> list[list[Example] | BadExample]:
        """The examples of every record, or what is wrong with it."""
        return [_alone(self._encode(record)) for record in records]

    def take_notes(self) -> Counter[str]:
        """What of the records since the last call had no effect."""
        return Counter()

    def _encode(self, record: Mapping[str, Any]) -> Example | BadExample:
        try:
            prompt, response = (_text(record.get(name), name) for name in self.columns)
        except _Unusable as error:
            return error.bad
        ids = self._raw_tags.spell_out_text(self._tokenizer.encode_batch([prompt])[0])
        tokens = numpy.array([*ids, *self._tokenizer.encode_tagged(response), self._tokenizer.eos_id])
        return _example(tokens, numpy.arange(len(tokens)) >= len(ids))


class ConversationFormat:
    """Conversations through a chat template: lists of `{"role", "content"[, "reasoning_content"]}`."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, column: str) -> None:
        self.columns = (column,)
        self._tokenizer = tokenizer
        self._template = template

    def encode_batch(self, records: Sequence[Mapping[str, Any]]) -> list[list[Example] | BadExample]:
        """The examples of every record, or what is wrong with it."""
        rendered = [self._render(record.get(self.columns[0])) for record in records]
        texts = [text for one in rendered if isinstance(one, Rendered) for text in (one.text, *one.prompts)]
        encoded = iter(self._template.encode_batch(texts))
        return [_alone(_masked(one, encoded)) if isinstance(one, Rendered) else one for one in rendered]

    def take_notes(self) -> Counter[str]:
        """What of the records since the last call had no effect."""
        return Counter()

    def ends_its_turn(self, example: Example) -> bool:
        """Whether the last learned token is a special one, like <|im_end|>: else the model does not learn to stop."""
        last = int(example.tokens[numpy.flatnonzero(example.has_loss)[-1]])
        return last == self._tokenizer.eos_id or last in self._template.special_ids

    def _render(self, value: Any) -> Rendered | BadExample:
        try:
            messages = [self._message(message, i) for i, message in enumerate(_message_list(value), start=1)]
            if all(message["role"] != "assistant" for message in messages):
                raise _Unusable("nothing to learn", "it has no assistant message: its loss mask would be all zeros")
            rendered = self._template.render(messages)
            _require_shown(rendered, messages)
        except TemplateError as error:
            return BadExample("unfit for the chat template", str(error))
        except _Unusable as error:
            return error.bad
        return rendered

    def _message(self, message: Any, number: int) -> Message:
        if not isinstance(message, Mapping):
            raise _Unusable("no messages", f"message {number} is no object with 'role' and 'content'")
        if message.get("role") not in ROLES:
            raise _Unusable("unknown role", f"message {number} has role {message.get('role')!r}, not {'/'.join(ROLES)}")
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                raise _Unusable("tool calls", f"message {number} has {name!r}: write the call out in its content")
        is_assistant = message["role"] == "assistant"
        content = _text(message.get("content"), f"content of message {number}")
        reasoning = message.get("reasoning_content")
        has_reasoning = is_assistant and reasoning is not None
        # Where the reasoning has a field of its own, the template writes the tags.
        keep_tags = is_assistant and not has_reasoning
        shown = {"role": message["role"], "content": self._template.spell_out(content, keep_tags=keep_tags)}
        if has_reasoning:
            reasoning = _text(reasoning, f"reasoning_content of message {number}")
            shown["reasoning_content"] = self._template.spell_out(reasoning, keep_tags=False)
        return shown


def _alone(example: Example | BadExample) -> list[Example] | BadExample:
    return example if isinstance(example, BadExample) else [example]


def _message_list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise _Unusable("no messages", "a list of messages is missing there (--messages-column names the field)")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        what = "missing" if value is None else f"{type(value).__name__}, not a string"
        raise _Unusable("no text", f"{name} is {what}")
    if any(mark in value for mark in MARKS):
        raise _Unusable("no Unicode text", f"{name} holds a code point that is no character (U+FDD0 or U+FDD1)")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _Unusable("no Unicode text", f"{name} holds half a surrogate pair") from None
    return value


def _require_shown(rendered: Rendered, messages: Sequence[Message]) -> None:
    """Raise TemplateError unless all that the assistant says is in the text, in order and to be learned."""
    learned = "".join(rendered.text[begin:end] for begin, end in rendered.spans)
    place = 0
    for number, message in enumerate(messages, start=1):
        if message["role"] != "assistant":
            continue
        said = [message.get("reasoning_content", ""), *re.split(f"{OPEN_TAG}|{CLOSE_TAG}", message["content"])]
        for part in filter(None, map(str.strip, said)):
            place = learned.find(part, place)
            if place < 0:
                raise TemplateError(
                    f"the chat template leaves out or changes what message {number} says (Qwen3's drops the reasoning "
                    f"of earlier turns): give every turn as a conversation of its own, or a template that keeps it "
                    f"(--chat-template)"
                )
            place += len(part)


def _masked(rendered: Rendered, encoded: Iterator[Encoded]) -> Example | BadExample:
    whole = next(encoded)
    prompts = [next(encoded) for _ in rendered.prompts]
    if any(not numpy.array_equal(prompt.tokens, whole.tokens[: len(prompt.tokens)]) for prompt in prompts):
        return BadExample(
            "unfit for the chat template",
            "an answer's first characters make one token with the end of the generation prompt: strip the answer",
        )
    return _example(whole.tokens, whole.overlaps(rendered.spans))


def _example(tokens: numpy.ndarray, has_loss: numpy.ndarray) -> Example | BadExample:
    if not has_loss[1:].any():
        return BadExample("nothing to learn", "its loss mask would be all zeros: no token of it is the assistant's")
    if has_loss.all():
        return BadExample("nothing but answers", "its loss mask would be all ones: it has no prompt")
    has_loss[0] = False
    return Example(tokens.astype(numpy.int32), has_loss)
