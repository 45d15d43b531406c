"""The forms in which different chat templates expect the same conversation."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_tpt.indexing.chat_shapes import REASONING_FIELDS, Chat, Message, texts_of
from megatron_tpt.indexing.chat_values import maybe_json
from megatron_tpt.think_tags import CLOSE_TAG, OPEN_TAG

_THOUGHTS = re.compile(rf"\s*{re.escape(OPEN_TAG)}(.*?){re.escape(CLOSE_TAG)}", re.DOTALL)


def with_reasoning_apart(chat: Chat, field: str) -> Chat:
    """A conversation whose answers have their reasoning in `field`, where the template looks for it, not in content."""
    messages = []
    for message in chat.messages:
        content = message["content"]
        if message["role"] == "assistant" and isinstance(content, str) and not set(message) & set(REASONING_FIELDS):
            found = _THOUGHTS.match(content)
            if found and not re.search(f"{OPEN_TAG}|{CLOSE_TAG}", found[1] + content[found.end() :]):
                answer = content[found.end() :].lstrip("\n")
                message = {**message, "content": answer, field: found[1].strip("\n")}
        messages.append(message)
    return replace(chat, messages=messages)


def with_reasoning_inline(chat: Chat) -> Chat:
    """A conversation whose answers have their reasoning in the content, between think tags."""
    messages = []
    for message in chat.messages:
        thoughts = _reasoning_field(message)
        if thoughts is not None:
            message = {name: value for name, value in message.items() if name not in REASONING_FIELDS}
            inlined = f"{OPEN_TAG}\n{thoughts.strip()}\n{CLOSE_TAG}\n\n"
            content = message["content"]
            if isinstance(content, list):
                message["content"] = [{"type": "text", "text": inlined + content[0]["text"]}, *content[1:]]
            else:
                message["content"] = inlined + (content or "")
        messages.append(message)
    return replace(chat, messages=messages)


def _reasoning_field(message: Message) -> str | None:
    return next((message[name] for name in REASONING_FIELDS if message.get(name)), None)


def forms(chat: Chat, *, with_parts: bool) -> Iterator[tuple[str | None, Chat]]:
    """A conversation in the forms that templates ask for, and a note where one differs in meaning from what was given.

    Where an answer has no content, an empty one, or none at all (DeepSeek's); arguments as an object, or as text
    (DeepSeek's); the developer's message as it is, or as the system's, for templates that know no developer; contents
    as they are, or `with_parts` as lists (those of models that see), or without lists, as vLLM joins their texts.
    """
    has_calls = any("tool_calls" in message for message in chat.messages)
    has_developer = any(message["role"] == "developer" for message in chat.messages)
    has_parts = any(isinstance(message["content"], list) for message in chat.messages)
    forms = itertools.product(
        ("developer", "system") if has_developer else ("developer",),
        ("given", *(["parts"] if with_parts else []), *(["joined"] if has_parts else [])),
        ("", None) if any(not message["content"] for message in chat.messages) else ("",),
        ("object", "text") if has_calls else ("object",),
    )
    for developer, contents, empty, arguments in forms:
        messages = [_in_form(message, developer, contents, empty, arguments) for message in chat.messages]
        notes = [_AS_SYSTEM] if developer == "system" else []
        notes += [_JOINED] if contents == "joined" else []
        yield ("; ".join(notes) or None), replace(chat, messages=messages)


_AS_SYSTEM = "role 'developer' is written as 'system', since the chat template knows no developer"
_JOINED = "text parts of a content are joined by line breaks, since the chat template reads no parts"


def _in_form(message: Message, developer: str, contents: str, empty: str | None, arguments: str) -> Message:
    message = dict(message)
    if message["role"] == "developer":
        message["role"] = developer
    if not message["content"]:
        message["content"] = empty
    elif contents == "parts" and isinstance(message["content"], str):
        message["content"] = [{"type": "text", "text": message["content"]}]
    elif contents == "joined":
        message["content"] = "\n".join(texts_of(message))
    if "tool_calls" in message:
        message["tool_calls"] = [_call_in_form(call, arguments) for call in message["tool_calls"]]
    return message


def _call_in_form(call: Mapping[str, Any], form: str) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if form == "object" and isinstance(arguments, str):
        arguments = _parsed_arguments(arguments)
    elif form == "text" and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _parsed_arguments(text: str) -> Any:
    """The object that a call's arguments are in JSON; the text where it is none. Marks are characters like others."""
    value = maybe_json(text)
    return value if isinstance(value, dict) else text


def reasoning_of(chat: Chat) -> dict[int, str]:
    """The reasoning of each message that has any, by place, be it in the content."""
    found = {}
    for number in chat.learned:
        message = chat.messages[number]
        text = _reasoning_field(message)
        if text is None and isinstance(message["content"], str) and (match := _THOUGHTS.match(message["content"])):
            text = match[1]
        if text is not None and text.strip():
            found[number] = text
    return found
