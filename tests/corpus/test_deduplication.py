"""Equal keys are found in any partition, in order, in bounded memory; pairs become clusters."""

import itertools
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_tpt.corpus import deduplication, words
from megatron_tpt.corpus.deduplication import (
    Pairs,
    document_number,
    document_place,
    find_duplicates,
    first_of_cluster,
    num_partitions,
    text_key,
    write_clusters,
    write_keys,
    write_partition,
)


def test_a_documents_number_is_its_place_in_input_order() -> None:
    places = [(0, 0), (0, 7), (0, 2**40 - 1), (1, 0), (2**20, 5)]
    numbers = [document_number(*place) for place in places]
    assert numbers == sorted(numbers) and numbers[-1] < 2**63
    assert [document_place(number) for number in numbers] == places


def test_keys_ignore_what_the_options_ignore() -> None:
    assert text_key("A  b\n", False, False) != text_key("a b", False, False)
    assert text_key("A  b", True, False) == text_key("a  b", True, False) != text_key("a b", True, False)
    assert text_key("a \n b ", False, True) == text_key("a b", False, True) != text_key("A b", False, True)
    assert text_key("A\tb", True, True) == text_key("a b", True, True)
    assert len(text_key("x", False, False)) == 16


@pytest.mark.parametrize("ignore_case", [True, False])
@pytest.mark.parametrize("ignore_whitespace", [True, False])
def test_the_key_of_a_text_in_chunks_is_that_of_the_whole(
    ignore_case: bool, ignore_whitespace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        " a(b) c \n",
        "  \n ",
        "",
        "x" * 50,
        "Ab (Cd)  中文 中\n\n" * 9,
        *(" " * n + "Σ ΑΣ  b" * 20 for n in range(20)),
    ]
    expected = [text_key(text, ignore_case, ignore_whitespace) for text in texts]
    for size in (3, 4, 10):
        monkeypatch.setattr(words, "_CHUNK_CHARACTERS", size)
        assert [text_key(text, ignore_case, ignore_whitespace) for text in texts] == expected


@pytest.mark.parametrize("partitions", [1, 3, 7])
def test_the_first_of_equal_documents_is_kept(tmp_path: Path, partitions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deduplication, "KEYS_PER_PARTITION", 50)  # several tables per partition
    draw = random.Random(partitions)
    texts = [f"document {draw.randrange(200)}" for _ in range(600)]
    files = []
    for shard, part in enumerate(itertools.batched(texts, 40)):
        files.append(tmp_path / f"{shard}.npy")
        write_keys(
            files[-1], (text_key(text, False, False) for text in part), range(shard * 40, shard * 40 + len(part))
        )
    found: dict[int, int] = {}
    for partition in range(partitions):
        path = tmp_path / f"{partition}.pairs"
        write_partition(path, files, partition, partitions)
        pairs = Pairs(path)
        assert 0 < len(pairs) < 600 / partitions * 1.5
        assert pairs.between(100, 200).items() <= pairs.between(0, 600).items()
        assert all(100 <= document < 200 for document in pairs.between(100, 200))
        found |= pairs.between(0, 600)
    assert found == {i: texts.index(text) for i, text in enumerate(texts) if texts.index(text) < i}


def test_half_a_key_is_no_key(tmp_path: Path) -> None:
    keys = [b"a" * 8 + b"1" * 8, b"a" * 8 + b"2" * 8, b"b" * 8 + b"1" * 8, b"a" * 8 + b"1" * 8]
    write_keys(tmp_path / "k.npy", keys, range(4))
    write_partition(tmp_path / "k.pairs", [tmp_path / "k.npy"], 0, 1)
    assert Pairs(tmp_path / "k.pairs").between(0, 4) == {3: 0}


def test_memory_does_not_grow_with_documents() -> None:
    def tables(num_tables: int) -> Iterator[np.ndarray]:
        for i in range(num_tables):
            keys = np.random.default_rng(0).integers(0, 2**63, (2, 10_000)).astype(np.uint64)
            yield np.concatenate([keys, np.arange(i * 10_000, (i + 1) * 10_000, dtype=np.uint64)[None]])

    def peak_bytes(num_tables: int) -> int:
        tracemalloc.start()
        num_pairs = sum(pairs.shape[1] for pairs in find_duplicates(tables(num_tables)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert num_pairs == (num_tables - 1) * 10_000
        return peak

    peak_bytes(2)  # the first call imports
    assert peak_bytes(60) < 1.2 * peak_bytes(20)


def test_partitions_are_as_many_as_the_keys_take() -> None:
    size = deduplication.KEYS_PER_PARTITION
    assert [num_partitions(n) for n in (1, size, size + 1, 10 * size)] == [1, 1, 2, 10]


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_the_connected_components(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deduplication, "KEYS_PER_PARTITION", 16)  # several chunks
    draw = random.Random(seed)
    edges = sorted({(max(pair), min(pair)) for pair in (draw.sample(range(200), 2) for _ in range(60 + 40 * seed))})
    expected = {node: node for edge in edges for node in edge}
    for _ in range(200):
        for a, b in edges:
            expected[a] = expected[b] = min(expected[a], expected[b])
    files = [tmp_path / "1.pairs", tmp_path / "2.pairs"]
    for file, part in zip(files, (edges[::2], edges[1::2]), strict=True):
        file.write_bytes(np.array(part, dtype=np.uint64).tobytes())
    write_clusters(tmp_path / "clusters", files)
    clusters = Pairs(tmp_path / "clusters")
    assert clusters.between(0, 200) == {node: least for node, least in expected.items() if node != least}
    for node in range(200):
        assert clusters.kept(node) == expected.get(node, node)


def test_a_long_chain_is_one_cluster() -> None:
    order = np.random.default_rng(0).permutation(5000).astype(np.uint64)
    nodes, least = first_of_cluster(np.stack([order[:-1], order[1:]]))
    assert len(nodes) == 5000 and (least == 0).all()
