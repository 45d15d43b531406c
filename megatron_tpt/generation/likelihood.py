"""Log-likelihoods of texts: choices after a question, and documents of any length.

    request = encode_pair(tokenizer, "Water boils at", " 100 degrees")
    [likelihood] = log_likelihoods(engine, [request])
    likelihood.total, likelihood.is_greedy

The definitions are lm-evaluation-harness's (`loglikelihood`, `loglikelihood_rolling`), so that figures are comparable.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.generation.api import Engine, LogLikelihood, ScoringRequest, expect_completion


def prefix_id(tokenizer: Any) -> int:
    """The token that marks the beginning of a text: begin-of-sequence, or end-of-sequence where there is none."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def encode_pair(tokenizer: Any, context: str, continuation: str, key: Any = None) -> ScoringRequest:
    """The request for `continuation` after `context`, without special tokens of the tokenizer's own.

    Both are encoded as one text, so that the tokens are those of the whole; white space at the end of the context
    belongs to the continuation, as most tokenizers join it to the word behind it. An empty context is replaced
    by `prefix_id`.
    """
    stripped = context.rstrip()
    whole = tokenizer(context + continuation, add_special_tokens=False).input_ids
    if not stripped:
        return ScoringRequest([prefix_id(tokenizer)], whole, key)
    context_ids = tokenizer(stripped, add_special_tokens=False).input_ids
    return ScoringRequest(context_ids, whole[len(context_ids) :], key)


def rolling_requests(ids: Sequence[int], prefix_id: int, max_model_len: int, key: Any = None) -> list[ScoringRequest]:
    """Requests that score every token of a document once, its first one after `prefix_id`.

    A document that does not fit into the context is scored in windows: all but the last score as many tokens as can be,
    after one token of context; the last has as much context as fits. There is none for a document without tokens.
    """
    window = max_model_len - 2  # minus a token of context, and the one that an engine may write
    requests = []
    for start in range(0, len(ids), window):
        end = min(start + window, len(ids))
        context = ids[end - window - 1 : start] if start else [prefix_id]
        requests.append(ScoringRequest(context, ids[start:end], key))
    return requests


def log_likelihoods(engine: Engine, requests: Iterable[ScoringRequest]) -> list[LogLikelihood]:
    """Those of `requests`, in their order. Raises EngineError for one that cannot be scored."""
    numbered = (request._replace(key=i) for i, request in enumerate(requests))
    done = {request.key: expect_completion(outcome) for request, outcome in engine.score(numbered)}
    return [done[i] for i in range(len(done))]


def document_log_likelihoods(engine: Engine, documents: Sequence[Sequence[int]], prefix_id: int) -> list[LogLikelihood]:
    """Those of whole documents, of any length but 0, in their order; `LogLikelihood.perplexity` is by token."""
    if engine.max_model_len is None:
        raise UserError("the server does not report how long its context is; set max_model_len of the engine")
    windows = [
        window
        for i, ids in enumerate(documents)
        for window in rolling_requests(ids, prefix_id, engine.max_model_len, key=i)
    ]
    parts: list[list[LogLikelihood]] = [[] for _ in documents]
    for window, likelihood in zip(windows, log_likelihoods(engine, windows), strict=True):
        parts[window.key].append(likelihood)
    return [
        LogLikelihood(
            tuple(value for part in own for value in part.log_probabilities),
            all(part.is_greedy for part in own),
            sum(part.num_prompt_tokens for part in own),
            engine.weight_version,
        )
        for own in parts
    ]
