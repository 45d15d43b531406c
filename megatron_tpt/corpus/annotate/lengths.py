"""Lengths of documents in tokens of a given tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tpt.corpus.documents import Document
from megatron_tpt.indexing.arrow_texts import array_of


class Lengths:
    """Tokens of the document (question and answer encoded on their own), of its answer with its thoughts, and of these
    alone. Thinking in a field of its own counts in all three, as tools/index.py writes it behind the document.

    The encoder is that of tools/index.py, proven against Hugging Face's on texts known to be difficult.
    """

    def __init__(self, tokenizer: Path) -> None:
        from megatron_tpt.indexing.encoders import choose_encoder
        from megatron_tpt.indexing.tokenizer import Tokenizer

        self._encoder = choose_encoder(Tokenizer(tokenizer), "auto", [])

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """See `Annotator.annotate`. `answer_tokens` is null of a document without an answer."""
        parts = [
            part
            for one in documents
            for part in (one.question if one.has_answer else one.text, one.answer, one.thoughts, one.thinking)
        ]
        lengths = self._encoder.encode(array_of(parts)).lengths.reshape(-1, 4).tolist()
        return [
            {
                "tokens": text + answer + thinking,
                "answer_tokens": answer + thinking if one.has_answer else None,
                "thinking_tokens": thoughts + thinking,
            }
            for one, (text, answer, thoughts, thinking) in zip(documents, lengths, strict=True)
        ]
