"""OpenAI's completions and chat protocol: what may come back. No network here.

Servers differ in what they return: everything is checked before it is believed.
"""

import email.utils
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from megatron_tpt.errors import UserError
from megatron_tpt.generation.api import Api, Completion, Failure, FinishReason, LogLikelihood
from megatron_tpt.names import shown

Outcome = Completion | LogLikelihood | Failure
Reader = Callable[[str, Any], Outcome]
"""Takes a server's URL and the JSON that it answered."""

PATHS: dict[Api, str] = {"completions": "/completions", "chat": "/chat/completions"}
_FINISH_REASONS: dict[Any, FinishReason] = {
    "stop": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
}
_MAX_MESSAGE = 300
_MAX_COUNT = 1 << 31
"""No context is as long: a larger number of tokens is none."""
_LEAST_LOG_PROBABILITY = -9999.0
"""vLLM's value for minus infinity, which JSON lacks."""


class UnusableAnswer(Exception):
    """A server answered, and the answer is of no use. A retry may help.

    `counts`: it may be this request that the server cannot answer; else the server is away or overloaded.
    """

    def __init__(self, reason: str, message: str, *, counts: bool, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.counts = counts
        self.retry_after_s = retry_after_s


class Refused(UnusableAnswer):
    """A server answered that it will not do this request. A retry does not help; other requests may be served."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason, failure.message, counts=True)
        self.failure = failure


def read_completion(
    url: str, answer: Any, *, with_log_probabilities: bool = False, with_weight_version: bool = False
) -> Completion | Failure:
    """The completion in the decoded `answer` of the server at `url`. Raises UnusableAnswer, or what Python raises for
    something of another form."""
    choice = answer["choices"][0]
    reason = choice["finish_reason"]
    text, reasoning = _texts(choice)
    usage = answer.get("usage") or {}
    token_ids = tuple(map(_token_id, choice.get("token_ids") or ()))
    num_prompt_tokens = _count(usage.get("prompt_tokens"))
    num_tokens = _count(usage.get("completion_tokens")) or len(token_ids)
    if reason == "content_filter":
        return Failure("content_filter", "the server's filter held the completion back")
    if not isinstance(reason, str) or reason not in _FINISH_REASONS:
        known = reason if isinstance(reason, str) and re.fullmatch("[a-z_]{1,20}", reason) else "no known reason"
        raise invalid_answer(url, f"the completion ended with {known}")
    if not isinstance(text, str) or not isinstance(reasoning, str | None):
        raise invalid_answer(url, "the completion holds no text")
    completion = Completion(text, token_ids, _FINISH_REASONS[reason], num_prompt_tokens, num_tokens, reasoning)
    if with_weight_version:
        [span] = choice["weight_versions"]
        completion = replace(completion, weight_version=version_of(span["version"]))
    if not with_log_probabilities:
        return completion
    given = choice["logprobs"]
    values = given["token_logprobs"] if "token_logprobs" in given else [t["logprob"] for t in given["content"]]
    log_probabilities = tuple(map(_log_probability, values))
    if not len(log_probabilities) == len(token_ids) == num_tokens:
        raise invalid_answer(
            url, f"{len(log_probabilities)} log-probabilities and {len(token_ids)} ids for {num_tokens} tokens"
        )
    return replace(completion, log_probabilities=log_probabilities)


def version_of(label: str) -> int:
    """The version of weights that vLLM calls `label`: "default" it was started with; -1 for what somebody else sent."""
    return 0 if label == "default" else int(label) if label.isdecimal() else -1


def read_log_likelihood(url: str, answer: Any, *, ids: Sequence[int], num_context: int) -> LogLikelihood:
    """The log-likelihood of the tokens `ids` from number `num_context` on, in the decoded `answer` of vLLM at `url`.
    Raises UnusableAnswer, or what Python raises for something of another form."""
    entries = answer["choices"][0]["prompt_logprobs"]
    if len(entries) != len(ids):
        raise invalid_answer(url, f"log-probabilities of {len(entries)} tokens for a prompt of {len(ids)}")
    own, likeliest = [], []
    for id, entry in zip(ids[num_context:], entries[num_context:], strict=True):
        own.append(_log_probability(entry[str(id)]["logprob"]))
        likeliest.append(max(_log_probability(other["logprob"]) for other in entry.values()))
    return LogLikelihood(tuple(own), own == likeliest, len(ids))


def _log_probability(value: Any) -> float:
    if type(value) not in (int, float) or not value <= 0:
        raise ValueError(f"{str(value)[:20]!r} is no log-probability")
    return float(value) if value > _LEAST_LOG_PROBABILITY else -math.inf


def refuses_stop(status: int, body: bytes) -> bool:
    """Whether this answer blames the request, and may do so for its stop texts."""
    return status in (400, 422) and re.search(r"\bstop\b", _error_message(body), re.IGNORECASE) is not None


def parse_answer(
    url: str, status: int, headers: Mapping[str, str], body: bytes, read: Reader = read_completion
) -> Outcome:
    """What the server at `url` made of a request, as `read` reads it.

    Raises UnusableAnswer for what a retry may change, Refused for what blames the request, and UserError
    for what no other request could fix.
    """
    if status == 200:
        status = _status_in(body)
    if status == 200:
        try:
            return read(url, orjson.loads(body))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise invalid_answer(url, f"the answer cannot be read ({type(error).__name__}: {error})") from error
    message = _error_message(body) or f"status {status}"
    # Some refuse with 429 a request that exceeds a minute's quota alone, as they do one that has to wait for the next
    # minute.
    over_quota = status == 429 and re.search(r"request too large|tokens must be reduced", message, re.IGNORECASE)
    if not over_quota:
        check_status(url, status, headers, body)
    # The last is what vLLM says where the prompt leaves room for none of the tokens that were asked for.
    signs = r"context.length|model.length|max_model_len|max_tokens must be at least 1, got (?:0|-)"
    too_long = over_quota or status == 413 or re.search(signs, message, re.IGNORECASE)
    filtered = message.startswith("content_filter ")
    reason = "content_filter" if filtered else "prompt_too_long" if too_long else "bad_request"
    raise Refused(Failure(reason, message))


def _status_in(body: bytes) -> int:
    """The status of an answer that came with status 200: some gateways pass on another server's error in its place."""
    if b'"error"' not in body:
        return 200
    try:
        answer = orjson.loads(body)
    except ValueError:
        return 200
    error = answer.get("error") if isinstance(answer, dict) else None
    if not error or answer.get("choices"):
        return 200
    if not isinstance(error, dict):
        return 502
    code = str(error.get("code"))
    if re.fullmatch("[45][0-9]{2}", code):
        return int(code)
    return 400 if "invalid_request" in f"{error.get('type')} {code}" else 502


def check_status(url: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Raise UnusableAnswer or UserError (see `parse_answer`), but not for 200 or for what blames the request."""
    advice = _ADVICE.get(status)
    if 300 <= status < 400:
        advice = "it sends elsewhere; name the final URL (https?)"
    said = _error_message(body)
    answer = f"{url} answered {status}" + (f" ({said})" if said else "")
    if advice is not None:
        raise UserError(f"{answer}: {advice}")
    if status in (408, 409, 425, 429) or status >= 500:
        reason = {408: "timeout", 504: "timeout", 429: "rate_limit"}.get(status, "server_error")
        # Overloaded or starting: no fault of the request. A gateway also says so of a request that takes too long.
        counts = status not in (425, 429, 503, 529)
        raise UnusableAnswer(reason, answer, counts=counts, retry_after_s=retry_after_s(headers))


_KEY_ADVICE = "put a valid key into the environment variable that --api-key-env names"
_URL_ADVICE = "check the URL (it mostly ends in /v1), the name of the model, and --api"
_ADVICE = {
    401: _KEY_ADVICE,
    402: "the account of this key has no credit left",
    403: _KEY_ADVICE,
    404: _URL_ADVICE,
    405: _URL_ADVICE,
    410: _URL_ADVICE,
}


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The seconds that a Retry-After header (a number or a date) asks to wait; None without a readable one."""
    value = headers.get("Retry-After", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


@dataclass(frozen=True)
class ListedModel:
    """What a server reports about a model that it has."""

    is_vllm: bool = False
    """Whether vLLM serves it."""
    context: int | None = None
    """Tokens of a prompt and its completion together, where the server reports it, as vLLM does."""


def parse_models(url: str, body: bytes) -> dict[str, ListedModel]:
    """The models that a server lists, by name; UnusableAnswer for what is no list."""
    try:
        return {
            _text(entry["id"]): ListedModel(entry.get("owned_by") == "vllm", _count(entry.get("max_model_len")) or None)
            for entry in orjson.loads(body)["data"]
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnusableAnswer("invalid_response", f"{url}: the list of models cannot be read", counts=False) from error


def _texts(choice: dict[str, Any]) -> tuple[Any, Any]:
    """The text and the reasoning of a choice."""
    message = choice.get("message")
    if message is None:
        return choice["text"], None
    reasoning = message.get("reasoning_content") or message.get("reasoning") or None
    text = message["content"]
    if isinstance(text, list):  # parts, those of the reasoning among them
        thoughts = "".join(_part_text(part["thinking"]) for part in text if part.get("type") == "thinking")
        text = "".join(_part_text(part) for part in text if part.get("type") != "thinking")
        reasoning = reasoning or thoughts or None
    if text is None:  # truncated while it was still reasoning, declined, or nothing to say: a valid answer
        text = message.get("refusal") or ""
    return text, reasoning


def _count(value: Any) -> int:
    """A number of tokens; 0 where the server reports none, or an impossible one."""
    if isinstance(value, float) and value.is_integer():  # JSON does not distinguish them
        value = int(value)
    return value if type(value) is int and 0 <= value < _MAX_COUNT else 0


def _token_id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        raise ValueError(f"{str(value)[:20]!r} is no token id")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:20]!r} is no text")
    return value


def _part_text(part: Any) -> str:
    """The text of a part of a message's content, which may be a string, an object with a text, or a list of those."""
    if isinstance(part, list):
        return "".join(map(_part_text, part))
    return part if isinstance(part, str) else part["text"]


def invalid_answer(url: str, message: str) -> UnusableAnswer:
    """The error for an answer that says nothing that can be used."""
    return UnusableAnswer("invalid_response", f"{url}: {message}", counts=True)


def _error_message(body: bytes) -> str:
    """What the server says went wrong, on one line, shortened: OpenAI's form, FastAPI's, or plain text."""
    try:
        content = orjson.loads(body)
    except ValueError:
        content = None
    if isinstance(content, dict):
        content = content.get("error", content.get("detail", content.get("message")))
    if isinstance(content, dict):
        content = " ".join(str(content[name]) for name in ("code", "message") if _is_plain(content.get(name)))
    if not isinstance(content, str):
        content = body[: 4 * _MAX_MESSAGE].decode("utf-8", "replace")
    return shown(" ".join(content.split()))[:_MAX_MESSAGE]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int)
