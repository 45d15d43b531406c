"""Whether the texts of a conversation show all that its messages say: templates drop what they do not know."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_tpt.indexing.chat_program import TemplateError
from megatron_tpt.indexing.chat_rendering import Rendered, Turn
from megatron_tpt.indexing.chat_shapes import REASONING_FIELDS, Chat, Message, texts_of
from megatron_tpt.indexing.chat_template import unmarked
from megatron_tpt.think_tags import CLOSE_TAG, OPEN_TAG


def require_shown(rendered: Sequence[Rendered], chat: Chat) -> None:
    """Raise TemplateError unless every text shows what its messages say, and learns what the assistant says."""
    for text, turns, _ in rendered:
        for turn in turns:
            learned = unmarked("".join(text[begin:end] for begin, end in turn.spans))
            _require_said(learned, chat.messages[turn.number], turn.number)
        _require_context(unmarked(text), chat, turns)


def _require_said(learned: str, message: Message, number: int) -> None:
    """Raise TemplateError unless a message is in what is learned of it, in order."""
    said = [message[name] for name in REASONING_FIELDS if message.get(name)]
    for text in texts_of(message):
        said += re.split(f"{OPEN_TAG}|{CLOSE_TAG}", text)
    place = 0
    for part in filter(None, (unmarked(text).strip() for text in said)):
        if (place := learned.find(part, place)) < 0:
            raise TemplateError(
                f"the chat template omits or changes what message {number + 1} says: give one that shows it "
                f"(--chat-template)"
            )
        place += len(part)
    for call in message.get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        shown = [unmarked(name) in learned, *(_is_written(value, learned) for value in _leaves(arguments))]
        if not all(shown) or (arguments and not isinstance(arguments, str) and unmarked(repr(arguments)) in learned):
            raise TemplateError(
                f"the chat template omits or changes a tool call of message {number + 1}: give one that shows it "
                f"(--chat-template)"
            )


def _require_context(text: str, chat: Chat, turns: Sequence[Turn]) -> None:
    """Raise TemplateError unless the tools, and all messages that are not learned here, are in the text."""
    for tool in chat.tools or ():
        if unmarked(tool["function"]["name"]) not in text:
            raise TemplateError("the chat template omits tools: give one that shows them (--chat-template)")
    here, place = {turn.number for turn in turns}, 0
    for number, message in enumerate(chat.messages[: max(here) + 1]):
        if number in here:
            continue
        for part in texts_of(message):
            # Of earlier turns a template may drop the reasoning.
            part = (
                unmarked(part).rpartition(CLOSE_TAG)[2].strip()
                if message["role"] == "assistant"
                else unmarked(part).strip()
            )
            found = _find(text, part, place)
            if found is None:
                raise TemplateError(
                    f"the chat template omits or changes what message {number + 1} says, whose role is "
                    f"{message['role']!r}: give one that shows it (--chat-template)"
                )
            place = found


def _find(text: str, part: str, place: int) -> int | None:
    """The end of `part` in `text`, as it is or as JSON writes it, at `place` or later, or else anywhere."""
    for start in (place, 0):
        for form in (part, _json_text(part), _json_text(part, ascii=True)):
            if (begin := text.find(form, start)) >= 0:
                return begin + len(form)
    return None


def _json_text(text: str, *, ascii: bool = False) -> str:
    return json.dumps(text, ensure_ascii=ascii)[1:-1]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _is_written(value: Any, text: str) -> bool:
    """Whether a text holds a value of a tool call's arguments, as JSON, Python or plain text write it."""
    if not isinstance(value, str):
        return any(form in text for form in (json.dumps(value, default=str), str(value)))
    value = unmarked(value).strip()
    return any(form in text for form in (value, _json_text(value), _json_text(value, ascii=True), repr(value)[1:-1]))
