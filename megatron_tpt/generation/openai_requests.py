"""OpenAI's completions and chat protocol: what is sent. No network here.

Fields that only vLLM knows are sent to vLLM alone.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from megatron_tpt.errors import UserError
from megatron_tpt.generation.api import EngineOptions, Request, Sampling, ScoringRequest
from megatron_tpt.generation.openai_api import Api, Reader, read_completion, read_log_likelihood

# Neutral values: else vLLM takes what the model's generation_config.json recommends.
_VLLM_FIELDS = {
    "return_token_ids": True,
    "skip_special_tokens": False,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
_LOG_PROBABILITIES: Mapping[Api, Mapping[str, Any]] = {"completions": {"logprobs": 0}, "chat": {"logprobs": True}}
_SCORING = Sampling(temperature=0, max_new_tokens=1)  # vLLM writes one token at least
_MASK_31_BITS = (1 << 31) - 1
_PROBE = "Hello."


@dataclass(frozen=True)
class Call:
    """One question to a server, and how its answer is read."""

    request: Request
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields that only vLLM is trusted with: a server that ignores one would answer another question."""
    read: Reader = read_completion
    by_tokens: bool = False
    """Ask vLLM in its own protocol, which takes token ids alone, and reports the weights that wrote the completion."""

    @property
    def needs_vllm(self) -> bool:
        """Whether only vLLM can be asked this."""
        return bool(self.fields) or self.by_tokens

    @property
    def path(self) -> str:
        """vLLM's own protocol is beside /v1, with which URLs of servers end."""
        return "/inference/v1/generate" if self.by_tokens else ""


def completion_call(request: Request, api: Api, *, by_tokens: bool = False) -> Call:
    """The call for a completion, with log-probabilities where they are asked for."""
    asked = request.sampling.log_probabilities
    if not asked and not by_tokens:
        return Call(request)
    read = functools.partial(read_completion, with_log_probabilities=asked, with_weight_version=by_tokens)
    fields = _LOG_PROBABILITIES[api] if asked and not by_tokens else {}
    return Call(request, fields, read, by_tokens)


def scoring_call(request: ScoringRequest) -> Call:
    """The call for a log-likelihood: vLLM returns the log-probability of every token of the prompt, and with each the
    likeliest token's."""
    ids = [*request.context, *request.continuation]
    read = functools.partial(read_log_likelihood, ids=ids, num_context=len(request.context))
    return Call(Request(ids, _SCORING), {"prompt_logprobs": 1}, read)


def without_stop(call: Call) -> Call:
    """`call` for a completion that continues to its end."""
    return replace(call, request=call.request._replace(sampling=replace(call.request.sampling, stop=())))


def probe(call: Call) -> Call:
    """A short, harmless call of the same form as `call`: a server that refuses it blames what all requests have in
    common, not a prompt."""
    request, prompt = call.request, call.request.prompt
    if isinstance(prompt, str):
        request = request._replace(prompt=_PROBE)
    elif prompt and isinstance(prompt[0], Mapping):
        messages = [{"role": str(message["role"]), "content": _PROBE} for message in prompt]  # type: ignore[index,call-overload]
        request = request._replace(prompt=messages)
    else:
        request = request._replace(prompt=list(prompt[:1]))  # type: ignore[arg-type]
    return replace(call, request=request, read=read_completion)


def request_body(call: Call, options: EngineOptions, *, is_vllm: bool) -> bytes:
    """The JSON body of `call`. Raises UserError for a kind of prompt that `options.api` does not take."""
    if call.by_tokens:
        return _body_of_tokens(call.request, options)
    sampling = call.request.sampling
    greedy = sampling.temperature == 0
    body: dict[str, Any] = {
        "model": options.model,
        **_prompt_field(call.request, options.api),
        options.length_field: min(sampling.max_new_tokens, options.max_model_len or sampling.max_new_tokens),
        "temperature": sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.seed is not None and not greedy:
        # Elsewhere a seed may be a signed number of 32 bits, or a double.
        body["seed"] = sampling.seed if is_vllm else sampling.seed & _MASK_31_BITS
    if is_vllm:
        body |= _VLLM_FIELDS
    for name in options.omit_fields:
        body.pop(name, None)
    return orjson.dumps(body | dict(options.request_fields) | dict(call.fields))


def _body_of_tokens(request: Request, options: EngineOptions) -> bytes:
    sampling = request.sampling
    greedy = sampling.temperature == 0
    parameters: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "stop": list(sampling.stop),
        "seed": None if greedy else sampling.seed,
        "logprobs": 0 if sampling.log_probabilities else None,
        "skip_special_tokens": False,
    }
    body = {"model": options.model, "token_ids": list(request.prompt), "output_mode": "text"}
    return orjson.dumps(body | {"sampling_params": parameters})


def _prompt_field(request: Request, api: Api) -> dict[str, Any]:
    prompt = request.prompt
    is_chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
    if is_chat != (api == "chat"):
        raise UserError(
            'a chat needs the API "chat" of the endpoint; choose --api chat'
            if is_chat
            else 'the API "chat" takes messages, not a prompt as text or token ids; choose --api completions'
        )
    return {"messages": list(prompt)} if is_chat else {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
