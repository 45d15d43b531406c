"""Rows of a packed index for people and programs: the text of every example, and which of it is learned."""

import itertools
import os
import sys
from typing import Any

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.conversations import Example
from megatron_tpt.indexing.pack_manifest import PackManifest
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.logs import print_result
from megatron_tpt.names import shown_lines

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_OPEN, _CLOSE = "⟦", "⟧"


def row_report(index: PackedIndex, row: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """One row by its examples, as JSON has them: text, tokens, and where in both the learned parts begin and end.

    Raises UserError when there is no such row.
    """
    if not 0 <= row < len(index):
        raise UserError(f"{index.prefix} has no row {row}; they are 0 to {len(index) - 1}")
    examples = [_example_report(example, tokenizer) for example in index[row]]
    return {
        "document": row,
        "num_tokens": sum(example["num_tokens"] for example in examples),
        "capacity": index.manifest.settings.sequence_length + 1,
        "loss_tokens": sum(example["loss_tokens"] for example in examples),
        "examples": examples,
    }


def _example_report(example: Example, tokenizer: Tokenizer) -> dict[str, Any]:
    cuts = [0, *(numpy.flatnonzero(numpy.diff(example.has_loss)) + 1).tolist(), len(example.tokens)]
    texts = _texts(example.tokens, cuts, tokenizer)
    ends = list(itertools.accumulate(map(len, texts)))
    return {
        "num_tokens": len(example.tokens),
        "loss_tokens": int(example.has_loss.sum()),
        "text": "".join(texts),
        "learned": [
            {"tokens": [begin, end], "characters": [last - len(text), last], "text": text}
            for (begin, end), text, last in zip(itertools.pairwise(cuts), texts, ends, strict=True)
            if example.has_loss[begin]
        ],
        "tokens": example.tokens.tolist(),
    }


def _texts(tokens: numpy.ndarray, cuts: list[int], tokenizer: Tokenizer) -> list[str]:
    """The texts between places in the tokens. Together they are the whole text, where a beginning of the tokens makes
    a beginning of the text (some tokenizers write no blank before the first of the tokens that they decode)."""
    beginnings = [tokenizer.decode(tokens[:cut]) for cut in cuts]
    if all(after.startswith(before) for before, after in itertools.pairwise(beginnings)):
        return [after[len(before) :] for before, after in itertools.pairwise(beginnings)]
    return [tokenizer.decode(tokens[begin:end]) for begin, end in itertools.pairwise(cuts)]


def print_row(report: dict[str, Any]) -> None:
    """Print a row: learned parts in green on a terminal, in brackets elsewhere. Plain: rich would expand the tabs."""
    has_colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    before, after = (_GREEN, _PLAIN) if has_colors else (_OPEN, _CLOSE)
    print_result(
        f"row {report['document']}, {report['num_tokens']:,} of {report['capacity']:,} tokens in "
        f"{len(report['examples']):,} examples; {before}learned{after}: {report['loss_tokens']:,}"
    )
    for number, example in enumerate(report["examples"]):
        print_result(f"--- example {number}, {example['num_tokens']:,} tokens, {example['loss_tokens']:,} learned ---")
        print_result("".join(_marked(example, before, after)))
    print_result("--- tokens ---")
    print_result(*(token for example in report["examples"] for token in example["tokens"]))


def _marked(example: dict[str, Any], before: str, after: str) -> list[str]:
    pieces, place = [], 0
    for part in example["learned"]:
        begin, end = part["characters"]
        pieces += [shown_lines(example["text"][place:begin]), before, shown_lines(example["text"][begin:end]), after]
        place = end
    return [*pieces, shown_lines(example["text"][place:])]


def ends_of_turns(index: PackedIndex) -> list[dict[str, Any]]:
    """Id and name of the special tokens that end learned turns; empty where an earlier version packed."""
    ids = index.manifest.end_of_turn_ids
    tokenizer = Tokenizer(PackManifest.tokenizer_path(index.prefix)) if ids else None
    return [{"id": id, "token": tokenizer.decode([id])} for id in ids] if tokenizer else []
