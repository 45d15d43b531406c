"""Annotators: what they find of a document becomes fields of its `meta`.

    rules.py         domain, reasoning intensity, language, heuristics of quality (datatrove's filters)
    lengths.py       tokens of question, answer, thoughts, all
    classifiers.py   fastText models and Hugging Face classifiers of your own
    judge.py         a language model that answers a prompt about each document

May import what the package `corpus` may.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from megatron_tpt.corpus.documents import Document

if TYPE_CHECKING:
    from megatron_tpt.corpus.curate_options import CurateOptions


class Annotator(Protocol):
    """Finds fields of `meta` for documents."""

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """What it finds of each document, by field; of what it cannot tell, a field is null. The same documents give
        the same, whatever other ones are with them."""
        ...


def make_annotators(options: "CurateOptions") -> list[Annotator]:
    """The annotators that options ask for, but for the judges. Raises UserError for a model that cannot be loaded."""
    from megatron_tpt.corpus.annotate import classifiers, lengths, rules

    makers: dict[str, Callable[[], Annotator]] = {
        "lengths": lambda: lengths.Lengths(options.require_tokenizer()),
        "domain": rules.Domain,
        "reasoning": rules.ReasoningIntensity,
        "language": rules.Language,
        "quality": rules.Quality,
    }
    models = [classifiers.load_classifier(one.name, one.path) for one in options.classifiers()]
    return [*(makers[name]() for name in dict.fromkeys(options.annotate)), *models]
