"""Log-probabilities and log-likelihoods of the real engines, against the logits of transformers."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CORPUS, make_model, unchanged_environment
from transformers import LlamaForCausalLM

from megatron_tpt.errors import UserError
from megatron_tpt.generation import (
    Engine,
    EngineError,
    EngineOptions,
    Failure,
    LogLikelihood,
    Request,
    Sampling,
    ScoringRequest,
    complete,
    document_log_likelihoods,
    encode_pair,
    load_tokenizer,
    log_likelihoods,
    open_engine,
    prefix_id,
    rolling_requests,
)

CONTEXT = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["transformers", "vllm", pytest.param("vllm-server", marks=pytest.mark.slow)])
def engine(model: str, request: pytest.FixtureRequest) -> Iterator[Engine]:
    options = EngineOptions(model, CONTEXT, max_num_seqs=4, kind=request.param)
    with unchanged_environment(), open_engine(options, needs=("log-probabilities", "log-likelihood")) as engine:
        yield engine


@torch.no_grad()
def reference(model: str, ids: list[int], temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
    """Log-probabilities [s - 1, vocabulary] of what follows each of `ids` but the last."""
    logits = LlamaForCausalLM.from_pretrained(model)(torch.tensor([ids])).logits[0, :-1] / temperature
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        dropped = (ordered.cumsum(-1) - ordered >= top_p).gather(-1, order.argsort(-1))
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits.log_softmax(-1)


def own(log_probabilities: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Those of the tokens of `ids` but the first."""
    return log_probabilities.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def some_ids(length: int, seed: int = 0) -> list[int]:
    ids: list[int] = torch.randint(5, 384, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def test_a_likelihood_is_that_of_the_continuations_tokens(model: str, engine: Engine) -> None:
    lengths = [(1, 1), (1, 40), (30, 1), (30, 12), (17, 60), (100, 27)]
    requests = [ScoringRequest(some_ids(a, a), some_ids(b, 100 + b)) for a, b in lengths]
    before = engine.stats()
    for request, likelihood in zip(requests, log_likelihoods(engine, requests), strict=True):
        ids = [*request.context, *request.continuation]
        expected = own(reference(model, ids), ids)[len(request.context) - 1 :]
        assert torch.allclose(torch.tensor(likelihood.log_probabilities), expected, rtol=0, atol=1e-4)
        assert likelihood.total == pytest.approx(float(expected.sum()), abs=1e-3)
        assert likelihood.num_prompt_tokens == len(ids)
    stats = engine.stats()
    assert stats.num_finished - before.num_finished == len(requests)
    assert stats.prompt_tokens - before.prompt_tokens == sum(map(sum, lengths))
    assert stats.completion_tokens == before.completion_tokens


def test_the_likeliest_continuation_alone_is_greedy(engine: Engine) -> None:
    prompts = [some_ids(10, seed) for seed in range(6)]
    written = complete(engine, prompts, Sampling(temperature=0, max_new_tokens=12))
    greedy = [list(completion.token_ids) for completion in written]
    other = [[*ids[:-1], (ids[-1] + 1) % 384] for ids in greedy]
    requests = [
        ScoringRequest(a, b) for continuations in (greedy, other) for a, b in zip(prompts, continuations, strict=True)
    ]
    assert [found.is_greedy for found in log_likelihoods(engine, requests)] == [True] * 6 + [False] * 6


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.3, 0.8), (0.0, 1.0)])
def test_sampled_tokens_have_the_log_probabilities_they_were_drawn_with(
    model: str, engine: Engine, temperature: float, top_p: float
) -> None:
    prompts = [some_ids(10, seed) for seed in range(5)]
    sampling = Sampling(temperature, top_p, max_new_tokens=20, seed=1, log_probabilities=True)
    for prompt, completion in zip(prompts, complete(engine, prompts, sampling), strict=True):
        ids = [*prompt, *completion.token_ids]
        expected = own(reference(model, ids, temperature or 1.0, top_p), ids)[len(prompt) - 1 :]
        assert completion.log_probabilities is not None
        assert torch.allclose(torch.tensor(completion.log_probabilities), expected, rtol=0, atol=1e-4)


def test_log_probabilities_come_only_where_they_are_asked_for(engine: Engine) -> None:
    short = Sampling(temperature=0, max_new_tokens=3)
    requests = [Request(some_ids(5), short, key=0), Request(some_ids(5), Sampling(0, 1, 3, log_probabilities=True))]
    found = {request.key: completion for request, completion in engine.generate(requests)}
    assert found[0].log_probabilities is None  # type: ignore[union-attr]
    assert len(found[None].log_probabilities) == found[None].num_tokens  # type: ignore[union-attr,arg-type]
    assert found[0].token_ids == found[None].token_ids  # type: ignore[union-attr]


def test_what_cannot_be_scored_fails_alone_and_is_never_shortened(engine: Engine) -> None:
    fits = ScoringRequest(some_ids(1), some_ids(CONTEXT - 2), "fits")
    too_long = ScoringRequest(some_ids(50), some_ids(CONTEXT - 50), "too long")
    no_context, nothing = ScoringRequest([], [5, 6], "no context"), ScoringRequest([5], [], "nothing")
    found = {request.key: outcome for request, outcome in engine.score([too_long, no_context, fits, nothing])}
    assert isinstance(found["fits"], LogLikelihood) and len(found["fits"].log_probabilities) == CONTEXT - 2
    reasons = {key: outcome.reason for key, outcome in found.items() if isinstance(outcome, Failure)}
    assert reasons == {"too long": "prompt_too_long", "no context": "bad_request", "nothing": "bad_request"}
    with pytest.raises(EngineError, match=f"{CONTEXT} tokens, but the context is {CONTEXT}"):
        log_likelihoods(engine, [fits, too_long])


def test_every_token_of_a_document_is_scored_once_with_the_context_that_fits(model: str, engine: Engine) -> None:
    documents = [some_ids(length, length) for length in (1, 40, CONTEXT - 2, CONTEXT - 1, 300)]
    window = CONTEXT - 2
    for ids, likelihood in zip(documents, document_log_likelihoods(engine, documents, prefix_id=0), strict=True):
        expected = own(reference(model, [0, *ids[:window]]), [0, *ids[:window]]).tolist()
        for start in range(window, len(ids), window):
            end = min(start + window, len(ids))
            seen = ids[end - window - 1 : end]
            expected += own(reference(model, seen), seen)[start - end :].tolist()
        assert likelihood.log_probabilities == pytest.approx(expected, abs=1e-4)
        assert likelihood.perplexity == pytest.approx(math.exp(-sum(expected) / len(ids)), rel=1e-3)


def test_scores_and_completions_take_turns(engine: Engine) -> None:
    scores = engine.score(ScoringRequest(some_ids(5), some_ids(5, i), i) for i in range(20))
    next(scores)
    scores.close()  # type: ignore[attr-defined]
    assert len(complete(engine, [some_ids(5)], Sampling(max_new_tokens=3))) == 1
    assert len(list(engine.score(ScoringRequest(some_ids(5), some_ids(5, i), i) for i in range(20)))) == 20


def test_an_engine_has_the_abilities_of_its_kind(engine: Engine) -> None:
    assert {"log-probabilities", "log-likelihood"} <= engine.abilities
    assert engine.max_model_len == CONTEXT
    assert engine.weight_version == 0
    if "update_weights" not in engine.abilities:
        with pytest.raises(UserError, match=r'has update_weights only .*weight_transfer.*; choose the engine "vllm"'):
            engine.update_weights([], 1)


def test_an_engine_without_an_ability_is_refused_before_it_starts(tmp_path: Path) -> None:
    for kind in ("vllm-server", "endpoint"):
        fields: dict[str, Any] = {"endpoints": ("http://localhost:1/v1",)} if kind == "endpoint" else {}
        options = EngineOptions(str(tmp_path / "no model"), kind=kind, **fields)  # type: ignore[arg-type]
        message = f'^the engine "{kind}" has update_weights only .*weight_transfer.*; choose the engine "vllm" or '
        with pytest.raises(UserError, match=message):
            open_engine(options, needs=["update_weights"]).__enter__()


def test_a_pair_is_encoded_as_one_text(model: str) -> None:
    tokenizer = load_tokenizer(model)
    request = encode_pair(tokenizer, "The ferry leaves ", "at nine", key=3)
    assert request.key == 3
    assert [*request.context, *request.continuation] == tokenizer("The ferry leaves at nine").input_ids
    assert tokenizer.decode(request.context) == "The ferry leaves"
    assert encode_pair(tokenizer, "", CORPUS[0]) == ScoringRequest([0], tokenizer(CORPUS[0]).input_ids)
    assert prefix_id(tokenizer) == 0


@pytest.mark.parametrize("length", [0, 1, 8, 9, 16, 17, 35])
def test_windows_cover_a_document_and_fill_the_context(length: int) -> None:
    ids = list(range(100, 100 + length))
    requests = rolling_requests(ids, prefix_id=7, max_model_len=10)
    assert [token for request in requests for token in request.continuation] == ids
    assert [request.context for request in requests[:1]] == [[7]][:length]
    for request in requests[1:]:
        whole = [*request.context, *request.continuation]
        assert len(whole) == 9
        assert whole == ids[whole[0] - 100 : whole[-1] - 99]
