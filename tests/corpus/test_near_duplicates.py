"""MinHash keys: the pairs they make are those of datatrove's own pipeline."""

import itertools
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from corpus_files import sentence

from megatron_tpt.corpus import near_duplicates, words
from megatron_tpt.corpus.deduplication import Pairs, write_clusters, write_keys, write_partition
from megatron_tpt.corpus.near_duplicates import MinHash


def variants(seed: int, num_words: int, changes: int) -> list[str]:
    """A text, and the same with some words replaced."""
    text = sentence(seed, num_words).split()
    other = list(text)
    for place in random.Random(seed).sample(range(num_words), changes):
        other[place] = f"other{place}"
    return [" ".join(text), " ".join(other)]


def corpus() -> list[str]:
    texts = [text for seed in range(60) for text in variants(seed, 100, seed % 12)]
    texts += ["too short for runs", "Too short for runs!", sentence(7, 100).upper(), *texts[:3]]
    random.Random(0).shuffle(texts)
    return texts


def clusters_of_datatrove(texts: list[str], signature: Any, folder: Path) -> set[frozenset[int]]:
    """Run datatrove's signature, bucket and cluster blocks, in two tasks."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature

    config, half = signature.config, len(texts) // 2
    for rank in range(2):
        part = texts[rank * half :] if rank else texts[:half]
        documents = (Document(text=text, id=str(i)) for i, text in enumerate(part))
        block = MinhashDedupSignature(str(folder / "signatures"), config, language=signature.word_tokenizer)
        block.run(documents, rank, 2)
    for bucket in range(config.num_buckets):
        buckets = MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets"), config=config)
        buckets.run(None, bucket, config.num_buckets)
    cluster = MinhashDedupCluster(str(folder / "buckets"), str(folder / "clusters"), config, save_cluster_id=True)
    cluster.run(None, 0, 1)
    found: dict[int, set[int]] = {}
    for path in (folder / "clusters").glob("*.clusters"):
        for document, number in struct.iter_unpack("<2I", path.read_bytes()):
            found.setdefault(number, set()).add(int(path.stem) * half + document)
    return set(map(frozenset, found.values()))


@pytest.mark.parametrize("fold_numbers", [True, False])
def test_clusters_are_those_of_datatroves_own_pipeline(tmp_path: Path, fold_numbers: bool) -> None:
    texts = corpus()
    minhash = MinHash(5, 14, 8, fold_numbers)
    keys = [(key, i) for i, text in enumerate(texts) for key in minhash.keys(text)]
    write_keys(tmp_path / "keys.npy", [key for key, _ in keys], [i for _, i in keys])
    for partition in range(3):
        write_partition(tmp_path / f"{partition}.pairs", [tmp_path / "keys.npy"], partition, 3)
    write_clusters(tmp_path / "near.pairs", [tmp_path / f"{partition}.pairs" for partition in range(3)])
    found: dict[int, set[int]] = {}
    for document, kept in Pairs(tmp_path / "near.pairs").between(0, len(texts)).items():
        assert kept < document
        found.setdefault(kept, {kept}).add(document)
    expected = clusters_of_datatrove(texts, minhash._signature, tmp_path / "datatrove")
    assert set(map(frozenset, found.values())) == expected
    assert 20 < len(expected) < 60  # some changes are too many


def test_texts_are_near_by_their_runs_of_words() -> None:
    minhash = MinHash(5, 14, 8, True)

    def are_near(a: str, b: str) -> bool:
        keys = minhash.keys(a), minhash.keys(b)
        assert all(len(each) == 14 and len(key) == 16 for each in keys for key in each)
        return not set(keys[0]).isdisjoint(keys[1])

    text = sentence(1, 80)
    assert are_near(text, text.upper().replace(" ", "\n"))
    assert are_near(text, text + " Read more.")
    assert not are_near(text, sentence(2, 80))
    assert not are_near(text, " ".join(reversed(text.split())))
    assert minhash.keys("four words are few") == []


def test_numbers_count_when_they_are_not_folded() -> None:
    one, two = (f"Ann has {n} apples and buys {n + 1} more. How many has she now?" for n in (3, 40))
    for fold_numbers in (True, False):
        minhash = MinHash(5, 14, 8, fold_numbers)
        assert (minhash.keys(one) == minhash.keys(two)) == fold_numbers


def test_equal_hashes_in_different_buckets_are_different_keys() -> None:
    minhash = MinHash(5, 14, 8, True)
    assert len(set(itertools.chain(*(minhash.keys(sentence(i, 40)) for i in range(10))))) == 140


@pytest.mark.parametrize("ngram", [1, 5])
def test_the_signature_of_a_text_in_chunks_is_datatroves_of_the_whole(
    ngram: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(near_duplicates, "_RUNS_AT_A_TIME", 7)
    minhash = MinHash(ngram, 14, 8, True)
    for text in (
        *(sentence(seed, 30 * seed + ngram) for seed in range(12)),
        "Die 3,14 Straßen, ΟΔΟΣ und Çà: 1.000 £ " * 30,
        "我有3个苹果。" * 60,
        "x" * 99 + " " + sentence(1, 40),
        "few",
    ):
        shingles = minhash._signature.get_shingles(text)
        found = minhash.signature(text)
        if not shingles.size:
            assert found is None
        else:
            assert found is not None and found.tolist() == minhash._signature.get_signature(shingles)


def test_memory_does_not_grow_with_a_text() -> None:
    minhash = MinHash(5, 14, 8, True)
    text = sentence(1, 50_000)
    minhash.keys(text[:10_000])  # imports
    tracemalloc.start()
    assert len(minhash.keys(text)) == 14
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text) > 250_000 and peak < 20 << 20  # datatrove's own: 130 MB
