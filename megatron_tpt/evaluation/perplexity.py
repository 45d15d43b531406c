"""Perplexity of documents: how well a model predicts their tokens (lm-evaluation-harness's rolling log-likelihood)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.generation import Engine, document_log_likelihoods, load_model_config, prefix_id

_LONGEST_WINDOW = 2048
_SHORTEST_WINDOW = 3  # a token of context, one to score, and room for one that an engine writes


@dataclass(frozen=True)
class DocumentScore:
    """How well a model predicts some documents, which are taken together."""

    num_documents: int
    num_tokens: int
    perplexity: float
    """exp of the mean negative log-probability of a token. Other tokenizers have other tokens, and another mean."""
    bits_per_byte: float
    """Negative log-likelihood in bits by byte of UTF-8: comparable between tokenizers."""


def window_of(model: str, asked: int | None) -> int:
    """The tokens of a window in which documents of `model` are scored. Raises UserError for more than it was made for,
    and for too few."""
    context = getattr(load_model_config(model), "max_position_embeddings", None)
    if asked is None:
        return min(context or _LONGEST_WINDOW, _LONGEST_WINDOW)
    if asked < _SHORTEST_WINDOW or (context is not None and asked > context):
        raise UserError(
            f"{model}: --document-window {asked} must be from {_SHORTEST_WINDOW} to {context or 'its context'}"
        )
    return asked


def score_documents(engine: Engine, tokenizer: Any, texts: Sequence[str], window: int) -> DocumentScore:
    """The score of whole documents, each after the token that begins a text, in windows of at most `window` tokens."""
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    likelihoods = document_log_likelihoods(engine, ids, prefix_id(tokenizer), window)
    total = math.fsum(likelihood.total for likelihood in likelihoods)
    num_tokens, num_bytes = sum(map(len, ids)), sum(len(text.encode()) for text in texts)
    return DocumentScore(len(texts), num_tokens, math.exp(-total / num_tokens), -total / math.log(2) / num_bytes)
