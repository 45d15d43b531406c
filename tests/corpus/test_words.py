"""Words in every script, and hashes of runs of them."""

import random

import numpy as np
import pytest
from corpus_files import sentence
from datatrove.utils.text import simplify_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_tpt.corpus import words
from megatron_tpt.corpus.words import ngram_hashes, split_words, text_chunks


def test_case_punctuation_and_compatible_forms_do_not_matter() -> None:
    for text in ("It's 24-hour,\n\t“FINE”…", "it s 24 hour fine", "_It_ **s**: 24–hour ﬁne!"):
        assert split_words(text) == [b"it", b"s", b"24", b"hour", b"fine"]
    assert split_words("...  !? ") == split_words("") == []


def test_every_script_has_words() -> None:
    assert split_words("हिन्दी में।") == ["हिन्दी".encode(), "में".encode()]  # vowel marks are part of a word
    assert split_words("我有3个苹果。") == [word.encode() for word in ("我", "有", "3", "个", "苹", "果")]
    assert len(split_words("ภาษาไทย")) > 3
    assert split_words("ÉTÉ à Zürich") == ["été".encode(), "à".encode(), "zürich".encode()]


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_the_fast_way_for_ascii_finds_the_same_words(text: str) -> None:
    assert split_words(text) == split_words(text + " é")[:-1]


@given(st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=40), st.sets(st.integers(1, 20), min_size=1))
def test_runs_have_equal_hashes_when_they_are_equal(text: list[bytes], lengths: set[int]) -> None:
    found = dict(ngram_hashes(text, sorted(lengths)))
    assert list(found) == [length for length in sorted(lengths) if length <= len(text)]
    for length, hashes in found.items():
        runs = [tuple(text[i : i + length]) for i in range(len(text) - length + 1)]
        assert hashes.dtype == np.uint64 and len(hashes) == len(runs)
        assert len(set(zip(runs, hashes.tolist(), strict=True))) == len(set(runs)) == len(set(hashes.tolist()))


def test_a_hash_is_the_same_alone_and_within_a_text() -> None:
    text = [b"%d" % i for i in range(100)]
    ((_, whole),) = ngram_hashes(text, [13])
    ((_, part),) = ngram_hashes(text[40:53], [13])
    assert whole[40] == part[0]


def test_the_cache_of_words_stays_small(monkeypatch) -> None:
    monkeypatch.setattr(words, "_MAX_CACHED_WORDS", 10)
    monkeypatch.setattr(words, "_word_hashes", words._WordHashes())
    text = [b"%d" % i for i in range(100)]
    before = dict(ngram_hashes(text, [2]))[2]
    assert len(words._word_hashes) <= 10
    assert np.array_equal(dict(ngram_hashes(text, [2]))[2], before)


# What could go wrong at a cut: marks, letters whose lower case depends on their neighbours, numbers, forms that join.
_DELICATE = "aΣ\u0301\u0338ſﬁ1.,٣'·:^ \n\u2003<=$_-中ガ\u3099ｶﾞกำ한\u1100\u1161İ\u00adकि"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=_DELICATE, min_size=5, max_size=80), st.integers(1, 9))
def test_the_chunks_of_a_text_have_its_words(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setattr(words, "_CHUNK_CHARACTERS", size)
    chunks = list(text_chunks(text))
    assert "".join(chunks) == text and all(len(chunk) <= 2 * size for chunk in chunks)
    begins = [sum(map(len, chunks[:i])) for i in range(1, len(chunks))]
    if all(words._CUT.match(text, begin) for begin in begins):  # else there was nowhere to cut
        assert [word for chunk in chunks for word in split_words(chunk)] == split_words(text)
        simplified = (simplify_text(chunk) for chunk in chunks)
        assert [word for chunk in simplified for word in split_words(chunk)] == split_words(simplify_text(text))


def test_short_texts_and_the_empty_one_are_one_chunk() -> None:
    assert list(text_chunks("")) == [""]
    assert list(text_chunks("short")) == ["short"]
    assert [len(chunk) for chunk in text_chunks("x" * 200_000)] == [131_072, 68_928]  # one word, cut nevertheless
    assert len(list(text_chunks(" ".join(random.choices(["aa", "bb"], k=100_000))))) == 5
    assert max(map(len, text_chunks("的" * 300_000))) == 65_536
    assert len(list(text_chunks(sentence(1)))) == 1
