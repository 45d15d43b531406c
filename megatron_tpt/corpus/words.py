"""The words of a text, and hashes of runs of words: what overlap between texts is measured in.

One definition for every language: a word is a run of letters, marks and digits. In scripts that are written without
spaces (Chinese, Japanese, Thai, ...) every character is a separate word. Nothing has to be downloaded.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

_ASCII_TABLE = bytes(ord(chr(code).lower()) if chr(code).isalnum() else ord(" ") for code in range(128)) + bytes(128)
_WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
# Any odd number with well mixed bits will do: this is 2^64 divided by the golden ratio.
_MULTIPLIER = 0x9E3779B97F4A7C15
_MAX_CACHED_WORDS = 1 << 18


_CHUNK_CHARACTERS = 1 << 16
# A text can be cut before these, and the words and their normal forms stay the same: none of them is part of a number
# or of a word of several letters, joins with what is before it, or affects the case of the letters next to it.
_CUT = re.compile(
    r"""[\s!"#$%&()*+\-/;<=>?@\[\\\]_{|}~"""
    "\u0e01-\u0e2e\u0e81-\u0eae\u0f40-\u0f69\u1000-\u1020\u1780-\u17a2"  # Thai, Lao, Tibetan, Myanmar, Khmer
    "\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff]"  # Hiragana, Katakana, Han
)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


class _SpacesForSymbols(dict[str, str]):
    """Character -> itself where it is a letter, mark or number, else a space."""

    def __missing__(self, character: str) -> str:
        value = self[character] = character if unicodedata.category(character)[0] in "LMN" else " "
        return value


_spaces_for_symbols = _SpacesForSymbols()


@functools.cache
def _word_pattern() -> Any:
    import regex  # `re` does not know the marks that Indic vowels are written with

    character = rf"[{_WITHOUT_SPACES}]\p{{M}}*"
    return regex.compile(rf"{character}|[\p{{L}}\p{{M}}\p{{N}}--[{_WITHOUT_SPACES}]]+", regex.VERSION1)


def text_chunks(text: str) -> Iterator[str]:
    """`text` in parts of about 64 Ki characters that have the same words as the whole, for memory that does not grow
    with it.

    A part without any place to cut (a word of more than 64 Ki letters, for example) ends after twice as many
    characters.
    """
    begin = 0
    while len(text) - begin > _CHUNK_CHARACTERS:
        last = begin + 2 * _CHUNK_CHARACTERS
        cut = _CUT.search(text, begin + _CHUNK_CHARACTERS, last)
        end = cut.start() if cut else min(last, len(text))
        yield text[begin:end]
        begin = end
    if begin < len(text) or not text:
        yield text[begin:]


def split_words(text: str) -> list[bytes]:
    """The words of `text` in lower case, without punctuation, as UTF-8. Compatible forms (NFKC) are the same word."""
    return spaced_words(text).split()


def word_tokenizer(split: Callable[[str], list[str]]) -> Any:
    """`split` in the shape that datatrove wants: its own tokenizer for English needs spaCy, those of other languages
    downloads. What we use of datatrove asks for words alone."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return split(text)

        def sent_tokenize(self, text: str) -> list[str]:
            raise NotImplementedError

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            raise NotImplementedError

    return Words()


def spaced_words(text: str) -> bytes:
    """The same with spaces between them, and none at the ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = _NOT_ASCII.sub(lambda match: _spaces_for_symbols[match[0]], text)  # curly quotes, dashes, ...
    if text.isascii():  # ten times as fast, with the same result
        return text.encode().translate(_ASCII_TABLE).strip()
    return " ".join(_word_pattern().findall(text.lower())).encode()


class _WordHashes(dict[bytes, int]):
    """Word -> 64-bit hash, remembered for common words; the same in every process."""

    def __missing__(self, word: bytes) -> int:
        if len(self) >= _MAX_CACHED_WORDS:
            self.clear()
        value = self[word] = int.from_bytes(hashlib.blake2b(word, digest_size=8).digest())
        return value


_word_hashes = _WordHashes()


def ngram_hashes(words: list[bytes], lengths: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
    """For each of `lengths` (ascending), the hash of every run of that many words, in order.

    The hash of a run is the polynomial of its words' hashes modulo 2^64, put together from those of its halves.
    Yields (length, uint64 array [number of runs]); lengths beyond the text are skipped.
    """
    known = {1: np.fromiter(map(_word_hashes.__getitem__, words), np.uint64, len(words))}
    for length in lengths:
        if length > len(words):
            return
        yield length, _runs(known, length)


def _runs(known: dict[int, np.ndarray], length: int) -> np.ndarray:
    if length not in known:
        right = length // 2
        left = length - right
        num_runs = len(known[1]) - length + 1
        power = np.uint64(pow(_MULTIPLIER, right, 1 << 64))
        known[length] = _runs(known, left)[:num_runs] * power + _runs(known, right)[left:]
    return known[length]
