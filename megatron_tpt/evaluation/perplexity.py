"""Perplexity of documents: how well a model predicts their tokens (lm-evaluation-harness's rolling log-likelihood)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.arms import Arm, label
from megatron_tpt.evaluation.samples import FAILED, Answer
from megatron_tpt.generation import load_model_config
from megatron_tpt.names import counted, shown

_LONGEST_WINDOW = 2048
_SHORTEST_WINDOW = 3  # a token of context, one to score, and room for one that an engine writes


@dataclass(frozen=True)
class DocumentResult:
    """How well a model predicts some documents, which are taken together."""

    model: str
    recurrences: int | None
    """Iterations of a recurrent model."""
    benchmark: str
    num_documents: int
    num_tokens: int
    """Tokens that were scored: all, once each."""
    perplexity: float | None
    """exp of the mean negative log-probability of a token; None when some could not be scored. Other tokenizers have
    other tokens, and another mean."""
    bits_per_byte: float | None
    """Negative log-likelihood in bits by byte of UTF-8: comparable between tokenizers. None like `perplexity`."""
    failed_requests: int
    """Documents that the engine could not score; the next run asks for them again."""
    samples: str
    """The file with the log-likelihoods of all documents, relative to results.json."""


def window_of(model: str | None, asked: int | None) -> int:
    """The tokens of a window in which documents are scored. Raises UserError for more than `model` was made for (None:
    not known before it answers), and for too few."""
    context = None if model is None else getattr(load_model_config(model), "max_position_embeddings", None)
    if asked is None:
        return min(context or _LONGEST_WINDOW, _LONGEST_WINDOW)
    if asked < _SHORTEST_WINDOW or (context is not None and asked > context):
        raise UserError(
            f"{model}: --document-window {asked} must be from {_SHORTEST_WINDOW} to {context or 'its context'}"
        )
    return asked


def summarize_documents(
    arm: Arm, benchmark: str, texts: Sequence[str], answers: Sequence[Answer], path: str
) -> DocumentResult:
    """The figures of one arm on the documents `texts`, from the answers to all of them."""
    total = -math.fsum(value for answer in answers for value in answer.log_likelihoods)
    num_tokens = sum(answer.output_tokens for answer in answers)
    num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    num_failed = sum(answer.finish_reason == FAILED for answer in answers)
    return DocumentResult(
        model=arm.model,
        recurrences=arm.recurrences,
        benchmark=benchmark,
        num_documents=len(texts),
        num_tokens=num_tokens,
        perplexity=None if num_failed else math.exp(total / num_tokens),
        bits_per_byte=None if num_failed else total / math.log(2) / num_bytes,
        failed_requests=num_failed,
        samples=path,
    )


def describe_documents(result: DocumentResult) -> str:
    """A result on one line."""
    name = f"{shown(label(result.model, result.recurrences))}, {shown(result.benchmark)}"
    if result.perplexity is None or result.bits_per_byte is None:
        return f"{name}: {result.failed_requests:,} of {counted(result.num_documents, 'document')} could not be scored"
    return (
        f"{name}: perplexity {result.perplexity:.4f}, {result.bits_per_byte:.4f} bits per byte on "
        f"{result.num_documents:,} documents of {result.num_tokens:,} tokens"
    )
