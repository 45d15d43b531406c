"""Log-probabilities from servers that are not ours: which are trusted, and what is believed."""

import math
from typing import Any

import pytest
from unruly_server import MODEL, UnrulyServer, unruly_server

from megatron_tpt.errors import UserError
from megatron_tpt.generation import (
    EngineOptions,
    Failure,
    LogLikelihood,
    Request,
    Sampling,
    ScoringRequest,
    complete,
    document_log_likelihoods,
    log_likelihoods,
    open_engine,
)

LOGPROBS = Sampling(1.0, 1.0, 8, log_probabilities=True)


def options(server: UnrulyServer, **changes: Any) -> EngineOptions:
    return EngineOptions(MODEL, kind="endpoint", endpoints=(server.url,), max_retries=1, **changes)


def scored(*entries: dict[int, float] | None) -> dict[str, Any]:
    """vLLM's answer with the log-probabilities of each token of the prompt, and of the likeliest one."""
    given = [entry and {str(id): {"logprob": value} for id, value in entry.items()} for entry in entries]
    choice = {"text": "x", "finish_reason": "length", "prompt_logprobs": given}
    return {"choices": [choice], "usage": {"prompt_tokens": len(entries), "completion_tokens": 1}}


def completed(log_probabilities: Any, ids: list[int]) -> dict[str, Any]:
    choice = {"text": "x", "finish_reason": "stop", "token_ids": ids, "logprobs": {"token_logprobs": log_probabilities}}
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": len(ids)}}


def test_servers_other_than_vllm_are_not_asked_for_log_probabilities() -> None:
    with unruly_server() as server, open_engine(options(server)) as engine:
        assert not engine.abilities
        refusal = '^the engine "endpoint" has {} only where vLLM serves the model.*; choose the engine "vllm"'
        with pytest.raises(UserError, match=refusal.format("log-likelihood")):
            log_likelihoods(engine, [ScoringRequest([5], [6])])
        with pytest.raises(UserError, match=refusal.format("log-probabilities")):
            complete(engine, ["a"], LOGPROBS)
        assert complete(engine, ["a"], Sampling())[0].text == "answer to a"  # the engine is none the worse for it
        assert len(server.bodies) == 1
        with (
            pytest.raises(UserError, match="only where vLLM serves the model"),
            open_engine(options(server), needs=["log-likelihood"]),
        ):
            pass


def test_a_likelihood_is_read_from_the_log_probabilities_of_the_prompt() -> None:
    with unruly_server(owner="vllm", context=16) as server, open_engine(options(server), ["log-likelihood"]) as engine:
        server.answers["[5, 6, 7]"] = scored(None, {6: -0.5, 9: -0.5}, {7: -0.25})
        server.answers["[5, 6, 8]"] = scored(None, {6: -0.5}, {8: -9999.0, 9: -0.5})
        tie, impossible = log_likelihoods(engine, [ScoringRequest([5], [6, 7]), ScoringRequest([5, 6], [8])])
        assert tie == LogLikelihood((-0.5, -0.25), True, 3)
        assert impossible == LogLikelihood((-math.inf,), False, 3)
        [body] = [body for body in server.bodies if body["prompt"] == [5, 6, 7]]
        assert (body["prompt_logprobs"], body["max_tokens"], body["temperature"]) == (1, 1, 0)
        assert engine.max_model_len == 16
        assert engine.stats().prompt_tokens == 6


@pytest.mark.parametrize(
    "answer",
    [
        scored(None, {6: -0.5}),
        scored(None, {6: -0.5}, {9: -0.25}),
        scored(None, {6: 0.5}, {7: -0.25}),
        scored(None, {6: -0.5}, None),
        scored(None, {6: True}, {7: -0.25}),
        {"choices": [{"text": "x", "finish_reason": "length"}]},
    ],
)
def test_log_probabilities_that_cannot_be_are_not_believed(answer: dict[str, Any]) -> None:
    with unruly_server(owner="vllm") as server, open_engine(options(server)) as engine:
        server.answers["[5, 6, 7]"] = answer
        server.answers["[5, 6]"] = scored(None, {6: -0.5})
        requests = [ScoringRequest([5], [6, 7], "bad"), *(ScoringRequest([5], [6], i) for i in range(200))]
        found = {request.key: outcome for request, outcome in engine.score(requests)}
        bad = found.pop("bad")
        assert isinstance(bad, Failure) and bad.reason == "invalid_response"
        assert all(outcome == LogLikelihood((-0.5,), True, 2) for outcome in found.values())


def test_a_completion_has_as_many_log_probabilities_as_tokens() -> None:
    with unruly_server(owner="vllm") as server, open_engine(options(server)) as engine:
        server.answers["good"] = completed([-1, -0.5], [5, 6])
        server.answers["few"] = completed([-1], [5, 6])
        [good] = complete(engine, ["good"], LOGPROBS)
        assert good.log_probabilities == (-1.0, -0.5)
        assert server.bodies[-1]["logprobs"] == 0
        requests = [Request("few", LOGPROBS, 0), *(Request("good", LOGPROBS, i) for i in range(1, 200))]
        found = {request.key: outcome for request, outcome in engine.generate(requests)}
        assert isinstance(found[0], Failure) and "1 log-probabilities and 2 ids for 2 tokens" in found[0].message
        assert all(found[i] == good for i in range(1, 200))


def test_a_chats_log_probabilities_are_read_too() -> None:
    with unruly_server(owner="vllm") as server, open_engine(options(server, api="chat")) as engine:
        answer = completed(None, [5, 6])
        answer["choices"][0]["logprobs"] = {"content": [{"token": "a", "logprob": -1.5}, {"token": "b", "logprob": 0}]}
        server.answers["hi"] = answer
        [found] = complete(engine, [[{"role": "user", "content": "hi"}]], LOGPROBS)
        assert found.log_probabilities == (-1.5, 0.0)
        assert server.bodies[-1]["logprobs"] is True


def test_where_a_server_takes_its_log_probabilities_is_not_guessed() -> None:
    with unruly_server(owner="vllm") as server, open_engine(options(server)) as engine:
        for temperature, top_p in ((0.6, 1.0), (1.0, 0.9)):
            with pytest.raises(UserError, match=r"choose temperature 1 and top-p 1, or the engine"):
                complete(engine, ["a"], Sampling(temperature, top_p, log_probabilities=True))
        assert not server.bodies


def test_a_document_needs_a_known_context() -> None:
    with unruly_server(owner="vllm") as server, open_engine(options(server)) as engine:
        assert engine.max_model_len is None
        with pytest.raises(UserError, match="set max_model_len"):
            document_log_likelihoods(engine, [[5, 6]], prefix_id=0)
