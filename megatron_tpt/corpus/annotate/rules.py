"""Annotators by rules: words and signs that texts of a kind have, and datatrove's heuristics of quality.

The rules cost microseconds per document and need no model. How far they can be trusted is measured on benchmarks whose
domain is known (docs/curation.md); where that is not enough, use a classifier.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from megatron_tpt.corpus.curate_options import FIELDS_OF
from megatron_tpt.corpus.documents import Document

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


def _table(**words: str) -> dict[bytes, str]:
    return {word.encode(): kind for kind, text in words.items() for word in text.split()}


_RARE = "\\^$#<`;{=)"


def _by_rare_character(signs: Sequence[str]) -> dict[str, list[str]]:
    """Signs by a character of theirs that most texts do not have, or by none."""
    found: dict[str, list[str]] = {}
    for sign in signs:
        found.setdefault(next((character for character in _RARE if character in sign), ""), []).append(sign)
    return found


def _num_signs(text: str, signs: Mapping[str, Sequence[str]]) -> int:
    """How often signs are in a text; to look for the rare characters first takes a fraction of the time."""
    return sum(text.count(sign) for rare, own in signs.items() if rare in text for sign in own)


class Domain:
    """math, code, science or general, by the words and signs in the first 16 Ki characters of question and answer.

    The domain is that with the most hits per 100 words, if these are enough for it; else general.
    """

    _words = _table(math=_MATH_WORDS, code=_CODE_WORDS, science=_SCIENCE_WORDS)
    _math_signs, _code_signs = _by_rare_character(_MATH_SIGNS), _by_rare_character(_CODE_SIGNS)

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """See `Annotator.annotate`."""
        return [{"domain": self.domain(one)} for one in documents]

    def domain(self, document: Document) -> str:
        """The domain of one document."""
        text, words = document.beginning, document.words
        hits = Counter(filter(None, map(self._words.get, words)))
        num_words = max(len(words), 20)
        if _share(hits, "science", num_words) >= max(1, _share(hits, "math", num_words)):
            return "science"  # formulas are the signs of mathematics, and sciences have them too
        hits["math"] += _num_signs(text, self._math_signs)
        hits["code"] += _num_signs(text, self._code_signs)
        shares = {name: _share(hits, name, num_words) for name in _MIN_HITS_PER_100_WORDS}
        best = max(shares, key=shares.__getitem__)
        return best if shares[best] >= 1 else "general"


def _share(hits: Mapping[str, int], name: str, num_words: int) -> float:
    """Hits of a domain per 100 words, over those that it needs."""
    return 100 * hits[name] / num_words / _MIN_HITS_PER_100_WORDS[name]


class ReasoningIntensity:
    """Words by which reasoning proceeds (therefore, suppose, wait, check, ...) per 100 words of the answer with its
    thinking, or of the document where it has none; to two decimals.
    """

    _cues = frozenset(word.encode() for word in _CUES.split())

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """See `Annotator.annotate`."""
        return [{"reasoning_intensity": self._intensity(one)} for one in documents]

    def _intensity(self, document: Document) -> float:
        words = document.reasoning_words
        return round(100 * sum(map(self._cues.__contains__, words)) / max(len(words), 1), 2)


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
        return {name: kind(language=_words_and_signs()) for name, kind in zip(names, kinds, strict=True)}

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """See `Annotator.annotate`."""
        from datatrove.data import Document as Datatrove

        return [
            {name: _verdict(one.filter(Datatrove(document.text, ""))) for name, one in self._filters.items()}
            for document in documents
        ]


def _verdict(result: Any) -> str:
    return "pass" if result is True else result[1]


def _words_and_signs() -> Any:
    """What the filters take for words: datatrove's own for English needs spaCy, those of other languages downloads."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return _WORD_OR_SIGN.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            raise NotImplementedError

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            raise NotImplementedError

    return Words()


_WORD_OR_SIGN = re.compile(r"[\w']+|[^\w\s]")
