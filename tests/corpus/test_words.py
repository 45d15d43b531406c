"""Words in every script, and hashes of runs of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_tpt.corpus import words
from megatron_tpt.corpus.words import ngram_hashes, split_words


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
