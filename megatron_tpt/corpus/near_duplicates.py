"""MinHash keys: documents that share most of their runs of words agree in all hashes of some bucket.

The signature is datatrove's (`MinhashDedupSignature`), with its normalisation of texts and its permutations, so that
the same parameters find the same pairs as its pipeline does. Only the split into words is our own: datatrove's English
needs spaCy, other languages need packages and downloads of theirs.
"""

import functools
import hashlib
from typing import Any

import numpy as np

from megatron_tpt.corpus.words import split_words


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
        shingles = self._signature.get_shingles(text)
        if not shingles.size:
            return []
        buckets = np.array(self._signature.get_signature(shingles), dtype=np.uint64)
        return [
            hashlib.blake2b(bucket.tobytes(), digest_size=16, salt=number.to_bytes(4)).digest()
            for number, bucket in enumerate(buckets)
        ]


@functools.cache
def _word_tokenizer() -> Any:
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        """`split_words` in the shape that datatrove wants."""

        def word_tokenize(self, text: str) -> list[str]:
            return [word.decode() for word in split_words(text)]

        def sent_tokenize(self, text: str) -> list[str]:
            raise NotImplementedError

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            raise NotImplementedError

    return Words()
