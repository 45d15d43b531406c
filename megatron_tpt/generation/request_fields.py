"""What users choose of OpenAI-compatible servers: URLs, request fields of their own, which of ours can change. Light to
import."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson

from megatron_tpt.errors import UserError

LengthField = Literal["max_tokens", "max_completion_tokens"]
OmittableField = Literal["temperature", "top_p", "seed", "stop"]
CHAT_TEMPLATE_KWARGS = "chat_template_kwargs"

_LENGTH = "the limit is --max-new-tokens, and --length-field chooses the name under which it is sent"
_WHOLE = "answers are read whole, one per request"
_READ = "answers could not be read with another value"
_FROM_INPUT = "the prompt is made from the input; see --prompt and --api"
_OWN_FIELDS = {
    "model": "it is --model",
    "messages": _FROM_INPUT,
    "prompt": _FROM_INPUT,
    "input": _FROM_INPUT,
    "max_tokens": _LENGTH,
    "max_completion_tokens": _LENGTH,
    "temperature": "it is --temperature; --omit-fields temperature leaves it to the server",
    "top_p": "it is --top-p; --omit-fields top_p leaves it to the server",
    "seed": "each request has a seed made from --seed; --omit-fields seed sends none",
    "stop": "it is --close-tag; --omit-fields stop sends none",
    "n": f"{_WHOLE}; for several thoughts per document give --rollouts",
    "best_of": _WHOLE,
    "stream": _WHOLE,
    "stream_options": _WHOLE,
    "echo": _READ,
    "return_token_ids": _READ,
    "skip_special_tokens": _READ,
    "extra_body": "it belongs to a client library, not to the protocol; give its entries as fields",
}
_CHAT_ONLY = ("chat_template", "add_generation_prompt", "continue_final_message", "reasoning_effort", "reasoning")
_PYTHON_LITERALS = {"True": "true", "False": "false", "None": "null"}


def parse_request_fields(texts: Iterable[str]) -> dict[str, Any]:
    """The fields in texts such as `top_k=20` or `chat_template_kwargs={"enable_thinking": false}`.

    A value is JSON where it can be, else a string. Raises UserError for what is no field, is given twice, or looks like
    JSON and is not.
    """
    fields: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not (equals and re.fullmatch(r"[A-Za-z_]\w*([.-]\w+)*", name)):
            raise UserError(f"--request-field {text}: give NAME=VALUE, as in top_k=20 (in quotes in a recipe)")
        if name in fields:
            raise UserError(f"--request-field {name}: given twice; choose one value")
        fields[name] = _value(name, value.strip())
    return fields


def _value(name: str, text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if text in _PYTHON_LITERALS:
            raise UserError(
                f"--request-field {name}={text}: write {_PYTHON_LITERALS[text]}, "
                f"or '\"{text}\"' if the server wants a string"
            ) from error
        if text[:1] in ("{", "[", '"'):
            raise UserError(f"--request-field {name}: its value is not valid JSON ({error})") from error
        return text


def check_request_fields(fields: Mapping[str, Any], *, is_chat: bool) -> None:
    """Raise UserError for fields that are not the user's to set, or have no effect where no chats are asked for."""
    for name, value in fields.items():
        if name in _OWN_FIELDS:
            raise UserError(f"--request-field {name}: cannot be set this way; {_OWN_FIELDS[name]}")
        if name == CHAT_TEMPLATE_KWARGS and not isinstance(value, dict):
            raise UserError(f'--request-field {name}: give an object, as in {name}={{"enable_thinking": false}}')
        if name in _CHAT_ONLY and not is_chat:
            raise UserError(f"--request-field {name}: only chats have this field; give --api chat, or omit the field")


def advice_on_refusal(sentence: str, length_field: LengthField) -> str:
    """Which options change the part of a request that a server's sentence blames; empty where none is known."""
    text = sentence.lower()
    other: LengthField = "max_tokens" if length_field == "max_completion_tokens" else "max_completion_tokens"
    options = []
    if length_field in text.replace(other, ""):
        is_unknown = other in text or re.search(r"unsupported|unknown|unrecogni[sz]ed|unexpected|not permitted", text)
        options.append(f"--length-field {other}" if is_unknown else "a lower --max-new-tokens")
    names: tuple[OmittableField, ...] = ("temperature", "top_p", "seed", "stop")
    options += [f"--omit-fields {name}" for name in names if re.search(rf"['\"`]{name}['\"`]|: {name}\b", text)]
    if "--omit-fields temperature" in options:
        options.append("--temperature 1")
    if re.search("chat.template", text):
        options.append("--api completions with --tokenizer")
    return f"; try {' or '.join(options)}" if options else ""


def check_url(url: str) -> None:
    """Raise UserError unless `url` is a base URL without secrets. The message never shows what may be a secret."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise UserError(
            f"the endpoint at {parts.hostname}: a URL must not hold a user or a password; put the key into the "
            "environment variable that --api-key-env names"
        )
    if parts.query or parts.fragment:
        raise UserError(f"the endpoint at {parts.hostname}: remove what follows ? or # in its URL")
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", url):
        raise UserError(f"endpoint {url!r}: not a URL such as http://host:8000/v1")
