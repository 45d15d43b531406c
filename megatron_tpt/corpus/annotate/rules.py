"""Annotators by rules: words and signs that texts of a kind have, and datatrove's heuristics of quality.

The rules need no model and cost microseconds per document, as pyarrow counts words and signs of a batch at a time. How
far they can be trusted is measured on benchmarks whose domain is known (docs/curation.md); where that is not enough,
use a classifier.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from megatron_tpt.corpus.curate_options import FIELDS_OF
from megatron_tpt.corpus.documents import Document
from megatron_tpt.corpus.words import spaced_words, word_tokenizer

_MATH_WORDS = """
    equation equations theorem lemma proof prove integer integers polynomial polynomials triangle triangles circle
    probability remainder divisible prime primes digits digit perimeter radius diameter sqrt frac boxed cdot sum product
    solve angle angles vertices rectangle fraction coefficient coefficients sequence geometric arithmetic logarithm sine
    cosine matrix determinant integral derivative modulo congruent parabola hypotenuse factorial permutations algebra
    times equals total each twice half
"""
_CODE_WORDS = """
    def return import print function class self int str len none true false elif else array string list dict tuple
    python java javascript const var void null boolean loop code algorithm compile api json sql html css github
    assert input output async await async lambda struct enum printf stdin stdout args kwargs append
"""
_SCIENCE_WORDS = """
    molecule molecules atom atoms electron electrons proton neutron ion ions velocity acceleration protein proteins cell
    cells gene genes dna rna enzyme enzymes species organism organisms reaction reactions acid acids oxidation mole
    moles molar chemical chemistry physics biology energy kinetic momentum voltage magnetic thermodynamic entropy
    photon wavelength frequency planet galaxy neurons membrane bacteria virus catalyst compound compounds bond bonds
    equilibrium concentration pressure temperature force mass gravity gas quantum nucleus isotope metal
"""
_CUES = """
    therefore thus hence because since so if then let suppose assume assuming implies imply must wait alternatively
    check verify step steps first second next finally conclude consider given means follows however but actually
    recall note need find compute substitute
"""
_MATH_SIGNS = (
    "\\frac",
    "\\sqrt",
    "\\(",
    "\\[",
    "$",
    "^{",
    "\\boxed",
    "\\cdot",
    "\\times",
    " = ",
    "####",
    "<<",
    "ow many ",
    "ow much ",
)
_CODE_SIGNS = (
    "```",
    "def ",
    "();",
    "):\n",
    ";\n",
    "{\n",
    "#include",
    " == ",
    "self.",
    "import ",
    "</",
    "return ",
    "()",
)
_MIN_HITS_PER_100_WORDS = {"math": 4.0, "code": 4.0, "science": 2.0}
_MIN_WORDS = 20
"""A shorter text counts as one of this many words: a single hit says little."""


class _WordCounts:
    """Counts words of given kinds."""

    def __init__(self, *words: str) -> None:
        """`words` of each kind, with spaces between them."""
        kinds = {word: kind for kind, text in enumerate(words) for word in text.split()}
        self._words = pyarrow.array(list(kinds))
        self._kinds = np.array([*kinds.values(), len(words)])  # the last, at -1, is that of all other words
        self._num_kinds = len(words)

    def count(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Words of each kind in each text, int [texts, kinds], and all words, at least 1, int [texts]."""
        spaced = pyarrow.array(map(spaced_words, texts), pyarrow.binary()).view(pyarrow.string())
        words = pyarrow.compute.ascii_split_whitespace(spaced)
        num_words = pyarrow.compute.list_value_length(words).to_numpy()
        places = pyarrow.compute.index_in(words.flatten(), value_set=self._words).fill_null(-1).to_numpy()
        bins = np.repeat(np.arange(len(texts)), num_words) * (self._num_kinds + 1) + self._kinds[places]
        counts = np.bincount(bins, minlength=len(texts) * (self._num_kinds + 1))
        return counts.reshape(len(texts), -1)[:, : self._num_kinds], num_words


class Domain:
    """math, code, science or general, by the words and signs at the beginnings of question and answer.

    The domain is that with the most hits per 100 words, if these are enough for it; else general.
    """

    _names = np.array([*_MIN_HITS_PER_100_WORDS, "general"])
    _signs = tuple("|".join(map(re.escape, signs)) for signs in (_MATH_SIGNS, _CODE_SIGNS))

    def __init__(self) -> None:
        self._words = _WordCounts(_MATH_WORDS, _CODE_WORDS, _SCIENCE_WORDS)

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """See `Annotator.annotate`."""
        return [{"domain": name} for name in self._domains([one.beginning for one in documents])]

    def _domains(self, texts: Sequence[str]) -> list[str]:
        hits, num_words = self._words.count(texts)
        enough = np.outer(np.maximum(num_words, _MIN_WORDS), list(_MIN_HITS_PER_100_WORDS.values())) / 100
        math, _, science = (hits / enough).T
        is_science = science >= np.maximum(1, math)  # formulas are the signs of mathematics, and sciences have them too
        array = pyarrow.array(texts, pyarrow.string())
        for kind, signs in enumerate(self._signs):
            hits[:, kind] += pyarrow.compute.count_substring_regex(array, pattern=signs).to_numpy()
        shares = hits / enough
        best = np.where(shares.max(axis=1) >= 1, shares.argmax(axis=1), -1)  # -1: general
        return self._names[np.where(is_science, 2, best)].tolist()


class ReasoningIntensity:
    """Words by which reasoning proceeds (therefore, suppose, wait, check, ...) per 100 words at the beginning of the
    answer with its thinking, or of the document where it has none; to two decimals.
    """

    def __init__(self) -> None:
        self._cues = _WordCounts(_CUES)

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """See `Annotator.annotate`."""
        counts, num_words = self._cues.count([one.reasoning for one in documents])
        intensity = 100 * counts[:, 0] / num_words
        return [{"reasoning_intensity": round(value, 2)} for value in intensity.tolist()]


class Language:
    """The code of the language, by py3langid on the first 4 Ki characters; null where it is not certain."""

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """See `Annotator.annotate`."""
        from megatron_tpt.languages import language

        return [{"language": language(one.text[: 1 << 12])} for one in documents]


class Quality:
    """datatrove's filters of Gopher (arXiv 2112.11446, table A1) and FineWeb (arXiv 2406.17557), as annotations:
    "pass", or what a filter would drop the document for.
    """

    @cached_property
    def _filters(self) -> dict[str, Any]:
        from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter

        kinds = (GopherQualityFilter, GopherRepetitionFilter, FineWebQualityFilter)
        names = FIELDS_OF["quality"]
        return {
            name: kind(language=word_tokenizer(_WORD_OR_SIGN.findall)) for name, kind in zip(names, kinds, strict=True)
        }

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """See `Annotator.annotate`."""
        from datatrove.data import Document as Datatrove

        return [
            {name: _verdict(one.filter(Datatrove(document.text, ""))) for name, one in self._filters.items()}
            for document in documents
        ]


def _verdict(result: Any) -> str:
    return "pass" if result is True else result[1]


_WORD_OR_SIGN = re.compile(r"[\w']+|[^\w\s]")
