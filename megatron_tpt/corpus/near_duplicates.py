"""MinHash keys: documents that share most of their runs of words agree in all hashes of some bucket.

The signature is datatrove's (`MinhashDedupSignature`), with its normalization of texts and its permutations, so that
the same parameters find the same pairs as its pipeline does. The split into words is our own: datatrove's English needs
spaCy, other languages need packages and downloads of theirs. A text is read in chunks, with the least of each hash so
far: datatrove holds all runs of words and all their hashes, about 500 times the size of the text.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_tpt.corpus.words import split_words, text_chunks, word_tokenizer

_RUNS_AT_A_TIME = 2048
"""Of 112 hashes each, so that they stay in the cache of the processor."""


class MinHash:
    """The keys of a text, one per bucket."""

    def __init__(self, ngram: int, num_buckets: int, hashes_per_bucket: int, fold_numbers: bool) -> None:
        from datatrove.pipeline.dedup.minhash import HashConfig, MinhashConfig, MinhashDedupSignature
        from datatrove.utils.text import TextNormConfig

        config = MinhashConfig(
            n_grams=ngram,
            num_buckets=num_buckets,
            hashes_per_bucket=hashes_per_bucket,
            norm_config=TextNormConfig(norm_numbers=fold_numbers),
            # Its xxhash functions pass text where xxhash 4 takes bytes.
            hash_config=HashConfig(hash_fc="sha1"),
        )
        # The folder is where its `run` would write; nothing is written here.
        self._signature = MinhashDedupSignature("/nonexistent", config, language=_word_tokenizer())

    def keys(self, text: str) -> list[bytes]:
        """16 bytes per bucket; nothing for a text of fewer words than a run has."""
        buckets = self.signature(text)
        return [
            hashlib.blake2b(bucket.tobytes(), digest_size=16, salt=number.to_bytes(4)).digest()
            for number, bucket in enumerate([] if buckets is None else buckets)
        ]

    def signature(self, text: str) -> np.ndarray | None:
        """uint64 [buckets, hashes per bucket], the least of each hash over the runs of words; None without any run."""
        signature: np.ndarray | None = None
        for shingles in self._shingles(text):
            hashes = np.array(self._signature.get_signature(shingles), dtype=np.uint64)
            signature = hashes if signature is None else np.minimum(signature, hashes)
        return signature

    def _shingles(self, text: str) -> Iterator[np.ndarray]:
        """Hashes of the runs of words, as datatrove's `get_shingles` makes them of a whole text: uint64 [runs, 1]."""
        from datatrove.utils.text import ngrams, simplify_text

        config, hash_run = self._signature.config, self._signature._hash_func
        words: list[str] = []
        for chunk in text_chunks(text):
            words += self._signature.word_tokenizer.word_tokenize(simplify_text(chunk, config.norm_config))
            runs = (hash_run(" ".join(run)) for run in ngrams(words, config.n_grams))
            hashes = np.fromiter(runs, np.uint64).reshape(-1, 1)
            yield from (hashes[begin : begin + _RUNS_AT_A_TIME] for begin in range(0, len(hashes), _RUNS_AT_A_TIME))
            words = words[len(words) - min(len(words), config.n_grams - 1) :]  # the next chunk's first runs begin here


@functools.cache
def _word_tokenizer() -> Any:
    return word_tokenizer(lambda text: [word.decode() for word in split_words(text)])
