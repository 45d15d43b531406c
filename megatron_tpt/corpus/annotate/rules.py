"""Annotators by rules: words and signs that texts of a kind have, and datatrove's heuristics of quality.

The rules need no model and cost microseconds per document, as pyarrow counts words and signs of a batch at a time. How
far they can be trusted is measured on benchmarks whose domain is known (docs/curation.md); where that is not enough,
use a classifier.
"""

import functools
import random
import re
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute

from megatron_tpt.corpus.curate_options import FIELDS_OF
from megatron_tpt.corpus.documents import Document
from megatron_tpt.corpus.words import spaced_words, word_tokenizer
from megatron_tpt.indexing.arrow_texts import array_of

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
_SPACE = ord(" ")
_MIN_WORDS = 20
"""A shorter text counts as one of this many words: a single hit says little."""


_SLOT_BITS = 16
_MAX_BYTES = 16
_MASKS = ((np.arange(_MAX_BYTES) < np.arange(_MAX_BYTES + 1)[:, None]) * np.uint8(255)).view(np.uint64)
"""By the bytes of a word, up to 16: what of its first and its second eight bytes belongs to it."""


class WordCounts:
    """Counts words of given kinds, by arrays over all words of a batch.

    A word is compared as 16 bytes, zeros behind its end. Those whose first two bytes occur are looked up in a table, at
    the slot that a hash names, under which no two words of it collide.
    """

    def __init__(self, *words: str) -> None:
        """`words` of each kind, with spaces between them; words have 2 to 15 bytes and one kind."""
        kinds = {word.encode(): kind for kind, text in enumerate(words) for word in text.split()}
        assert all(1 < len(word) < _MAX_BYTES for word in kinds)
        self._kinds = np.array([*kinds.values()])
        self._num_kinds = len(words)
        self._halves = np.array([*kinds], f"S{_MAX_BYTES}").view(np.uint64).reshape(-1, 2).T.copy()
        draw = random.Random(0)
        slots = np.zeros(0)
        while len(np.unique(slots)) < len(kinds):
            self._factor = np.uint64(draw.getrandbits(64) | 1)
            slots = self._slots(self._halves[0], self._halves[1])
        self._row_at = np.zeros(1 << _SLOT_BITS, np.int16)
        self._row_at[slots] = np.arange(len(kinds))
        self._can_begin = np.zeros(1 << 16, bool)
        self._can_begin[[int.from_bytes(word[:2], sys.byteorder) for word in kinds]] = True

    def _slots(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        mixed = (first * self._factor ^ second) * self._factor
        return (mixed >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """Words of each kind, and all words, in each text: int [texts, kinds + 1]."""
        parts = [spaced_words(text) + b" " for text in texts]
        characters = b"".join(parts) + bytes(_MAX_BYTES)
        ends = np.flatnonzero(np.frombuffer(characters, np.uint8) == _SPACE)
        begins = np.concatenate([[0], ends + 1])[:-1]
        words_before = np.searchsorted(ends, np.cumsum([len(part) for part in parts], dtype=np.int64))
        rows, places = self._find(characters, begins, ends)
        num_bins = self._num_kinds + 1
        bins = np.searchsorted(words_before, places, side="right") * num_bins + self._kinds[rows]
        counts = np.bincount(bins, minlength=len(texts) * num_bins).reshape(len(texts), num_bins)
        num_words = np.concatenate([[0], np.cumsum(ends > begins)])  # between two spaces there may be nothing
        counts[:, -1] = np.diff(num_words[words_before], prepend=0)
        return counts

    def _find(self, characters: bytes, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which words are of a kind: their rows in the table, and their places in `begins`."""
        pairs, eights = (
            np.ndarray(len(characters) + 1 - np.dtype(type).itemsize, type, characters, strides=(1,))
            for type in (np.uint16, np.uint64)
        )
        places = np.flatnonzero(self._can_begin[pairs[begins]])
        begins = begins[places]
        masks = _MASKS[np.minimum(ends[places] - begins, _MAX_BYTES)]
        first, second = eights[begins] & masks[:, 0], eights[begins + 8] & masks[:, 1]
        rows = self._row_at[self._slots(first, second)]
        is_found = (self._halves[0][rows] == first) & (self._halves[1][rows] == second)
        return rows[is_found], places[is_found]


class _Counts:
    """Counts the words of all kinds at the beginnings of documents, once for both annotators that need them."""

    def __init__(self) -> None:
        self._words = WordCounts(_MATH_WORDS, _CODE_WORDS, _SCIENCE_WORDS, _CUES)
        self._documents: Sequence[Document] | None = None
        self._last: tuple[np.ndarray, np.ndarray]

    def of(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
        """Words of each kind, and all words, at least 1: of `Document.beginning`, and of answer and thinking; int
        [documents, kinds + 1] each."""
        if documents is not self._documents:
            beginnings = [one.beginnings for one in documents]
            counts = self._words.count([text for own in beginnings for text in own])
            question, answer, thinking = counts.reshape(len(documents), 3, counts.shape[1]).swapaxes(0, 1)
            about, reasoning = question + answer, answer + thinking
            texts = [one.beginning for one in documents]
            tagged = [i for i, (text, own) in enumerate(zip(texts, beginnings, strict=True)) if _is_less(text, own)]
            about[tagged] = self._words.count([texts[place] for place in tagged])
            for own in (about, reasoning):
                own[:, -1] = np.maximum(own[:, -1], 1)
            self._documents, self._last = documents, (about, reasoning)
        return self._last


def _is_less(text: str, parts: tuple[str, str, str]) -> bool:
    """Whether think tags were taken out of a beginning."""
    return len(text) < len(parts[0]) + len(parts[1])


_counts = functools.cache(_Counts)


class Domain:
    """math, code, science or general, by the words and signs at the beginnings of question and answer.

    The domain is that with the most hits per 100 words, if these are enough for it; else general.
    """

    _names = np.array([*_MIN_HITS_PER_100_WORDS, "general"])
    _signs = tuple("|".join(map(re.escape, signs)) for signs in (_MATH_SIGNS, _CODE_SIGNS))

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """See `Annotator.annotate`."""
        return [{"domain": name} for name in self._domains(documents)]

    def _domains(self, documents: Sequence[Document]) -> list[str]:
        about, _ = _counts().of(documents)
        hits, num_words = about[:, : len(_MIN_HITS_PER_100_WORDS)].copy(), about[:, -1]
        enough = np.outer(np.maximum(num_words, _MIN_WORDS), list(_MIN_HITS_PER_100_WORDS.values())) / 100
        math, _, science = (hits / enough).T
        is_science = science >= np.maximum(1, math)  # formulas are the signs of mathematics, and sciences have them too
        array = array_of([one.beginning for one in documents])
        for kind, signs in enumerate(self._signs):
            hits[:, kind] += pyarrow.compute.count_substring_regex(array, pattern=signs).to_numpy()
        shares = hits / enough
        best = np.where(shares.max(axis=1) >= 1, shares.argmax(axis=1), -1)  # -1: general
        return self._names[np.where(is_science, 2, best)].tolist()


class ReasoningIntensity:
    """Words by which reasoning proceeds (therefore, suppose, wait, check, ...) per 100 words at the beginning of the
    answer with its thinking, or of the document where it has none; to two decimals.
    """

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """See `Annotator.annotate`."""
        _, reasoning = _counts().of(documents)
        intensity = 100 * reasoning[:, -2] / reasoning[:, -1]
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
