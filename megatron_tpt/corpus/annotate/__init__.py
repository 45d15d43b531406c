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
    from megatron_tpt.corpus.curate_options import AnnotatorName, CurateOptions


class Annotator(Protocol):
    """Finds fields of `meta` for documents."""

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """What it finds of each document, by field; of what it cannot tell, a field is null. The same documents give
        the same, whatever other ones are with them."""
        ...


def make_annotators(options: "CurateOptions") -> list[Annotator]:
    """The annotators that options ask for, but for the judges. Raises UserError for a model that cannot be loaded."""
    annotators = [_make(name, options) for name in dict.fromkeys(options.annotate)]
    if options.classifiers():
        from megatron_tpt.corpus.annotate.classifiers import load_classifier

        annotators += [load_classifier(one.name, one.path) for one in options.classifiers()]
    return annotators


def _make(name: "AnnotatorName", options: "CurateOptions") -> Annotator:
    """What is imported here takes memory in every process: nothing without need."""
    if name == "lengths":
        from megatron_tpt.corpus.annotate.lengths import Lengths

        return Lengths(options.require_tokenizer())
    from megatron_tpt.corpus.annotate import rules

    makers: dict[str, Callable[[], Annotator]] = {
        "domain": rules.Domain,
        "reasoning": rules.ReasoningIntensity,
        "language": rules.Language,
        "quality": rules.Quality,
    }
    return makers[name]()
