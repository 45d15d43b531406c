"""Documents split into sentences, as Megatron's `--split-sentences` does, but without losing a character."""

import functools
import itertools


def split(text: str) -> list[str]:
    """The sentences of a text; white space between two belongs to the second. Together they are the text.

    Punkt's rules without trained parameters: nothing is downloaded. It knows no abbreviations.
    """
    ends = [end for _, end in _tokenizer().span_tokenize(text)]
    bounds = [0, *ends[:-1], len(text)] if ends else [0, len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(bounds)]


@functools.cache
def _tokenizer():  # type: ignore[no-untyped-def]
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return PunktSentenceTokenizer()
