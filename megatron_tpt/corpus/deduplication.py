"""Finding equal keys among billions of documents, in bounded memory.

Every document has one key (exact duplicates) or several (near-duplicates); two documents with an equal key belong
together. A shard of documents leaves its keys sorted in one file. The space of keys is cut into as many partitions as
needed for each to fit in memory; a partition takes its slice of every file, in the order of the documents, and notes
for every document that is not the first with its key which one was.

A document's number is its place in the input, (source, row): numbers are in input order. Keys are 16 bytes, so that two
different texts with one key are not to be expected (2^-128 per pair).

datatrove's blocks for this step are not used: they keep all signature files open at once and follow them with a heap in
Python, compare 8 bytes, and cluster near-duplicates in Python dictionaries.
"""

import bisect
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_tpt.corpus.words import text_chunks
from megatron_tpt.files import atomic_write

KEYS_PER_PARTITION = 1 << 21
_ROW_BITS = 40


def document_number(source: int, row: int) -> int:
    """The number of row `row` of source `source`, both from 0."""
    return source << _ROW_BITS | row


def document_place(document: int) -> tuple[int, int]:
    """(source, row) of a document's number."""
    return document >> _ROW_BITS, document & ((1 << _ROW_BITS) - 1)


def sources_of(documents: np.ndarray) -> np.ndarray:
    """The source of each document, by its number: int64."""
    return (documents >> np.uint64(_ROW_BITS)).astype(np.int64)


def text_key(text: str, ignore_case: bool, ignore_whitespace: bool) -> bytes:
    """The key of a text for exact duplicates: 16 bytes of SHA-256."""
    digest = hashlib.sha256()
    chunks = (chunk.lower() if ignore_case else chunk for chunk in text_chunks(text))
    for chunk in _single_spaces(chunks) if ignore_whitespace else chunks:
        digest.update(chunk.encode())
    return digest.digest()[:16]


def _single_spaces(chunks: Iterable[str]) -> Iterator[str]:
    """Chunks of a text with one space for every run of white space, and none at its ends."""
    is_started = is_apart = False
    for chunk in chunks:
        is_apart = is_apart or chunk[:1].isspace()
        if words := chunk.split():
            yield " " * (is_started and is_apart) + " ".join(words)
            is_started, is_apart = True, chunk[-1].isspace()


def write_keys(path: Path, keys: Iterable[bytes], documents: Iterable[int]) -> None:
    """Write the keys of a shard, sorted: uint64 [3, keys] of first half, second half, document."""
    halves = np.frombuffer(b"".join(keys), dtype=">u8").reshape(-1, 2)
    table = np.stack([halves[:, 0], halves[:, 1], np.fromiter(documents, np.uint64, len(halves))]).astype(np.uint64)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, _sorted_by_key(table))


def num_partitions(num_keys: int) -> int:
    """How many partitions `num_keys` keys take."""
    return max(1, -(-num_keys // KEYS_PER_PARTITION))


def write_partition(path: Path, key_files: Iterable[Path], partition: int, partitions: int) -> None:
    """Compare the keys of partition number `partition` of `partitions` and write its pairs (see `Pairs`).

    `key_files` are in the order of their documents.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        for pairs in find_duplicates(_slices(key_files, partition, partitions)):
            file.write(np.ascontiguousarray(pairs.T).tobytes())


def find_duplicates(tables: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """For every document that is not the first with its key, yield the document and that first one.

    Takes key tables uint64 [3, keys] in the order of their documents, yields uint64 [2, pairs], sorted by document.
    Memory: the distinct keys so far and one table, however often a key occurs.
    """
    firsts = np.empty((3, 0), dtype=np.uint64)
    for table in tables:
        both = _sorted_by_key(np.concatenate([firsts, table], axis=1))
        is_first = np.ones(both.shape[1], dtype=bool)
        is_first[1:] = (both[:2, 1:] != both[:2, :-1]).any(axis=0)
        first_of_each = both[2][is_first][np.cumsum(is_first) - 1]
        pairs = np.stack([both[2], first_of_each])[:, ~is_first]
        yield pairs[:, np.lexsort((pairs[1], pairs[0]))]
        firsts = both[:, is_first]


def _sorted_by_key(table: np.ndarray) -> np.ndarray:
    """Sorting is stable: of equal keys the first document stays first."""
    return table[:, np.lexsort((table[1], table[0]))]


def _slices(key_files: Iterable[Path], partition: int, partitions: int) -> Iterator[np.ndarray]:
    """The keys of one partition, from as many files at a time as make up a table of a good size."""
    begin, end = (np.uint64(min((i << 64) // partitions, 2**64 - 1)) for i in (partition, partition + 1))
    slices: list[np.ndarray] = []
    num_keys = 0
    for path in key_files:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
        first = np.searchsorted(table[0], begin)
        last = np.searchsorted(table[0], end) if partition + 1 < partitions else table.shape[1]
        slices.append(np.array(table[:, first:last]))
        num_keys += int(last - first)
        if num_keys >= KEYS_PER_PARTITION // 2:
            yield np.concatenate(slices, axis=1)
            slices, num_keys = [], 0
    if slices:
        yield np.concatenate(slices, axis=1)


class Pairs:
    """A file of pairs (document that is dropped, document that is kept), sorted; nothing of it is held in memory."""

    def __init__(self, path: Path) -> None:
        self._pairs = np.empty((0, 2), np.uint64)
        if path.stat().st_size:
            self._pairs = np.memmap(path, dtype=np.uint64, mode="r").reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._pairs)

    def between(self, begin: int, end: int) -> dict[int, int]:
        """Dropped document -> kept document, for the documents from `begin` to before `end`."""
        rows = range(len(self))
        first, last = (
            bisect.bisect_left(rows, value, key=lambda row: int(self._pairs[row, 0])) for value in (begin, end)
        )
        return dict(np.array(self._pairs[first:last]).tolist())

    def kept(self, document: int) -> int:
        """The document that is kept for `document`: itself, if it is not dropped."""
        return self.between(document, document + 1).get(document, document)

    def kept_for(self, documents: np.ndarray) -> np.ndarray:
        """The same for many: uint64 [documents]."""
        if not len(self):
            return documents
        rows = np.minimum(np.searchsorted(self._pairs[:, 0], documents), len(self) - 1)
        return np.where(self._pairs[rows, 0] == documents, self._pairs[rows, 1], documents)

    def chunks(self, num_pairs: int) -> Iterator[np.ndarray]:
        """All pairs, in arrays uint64 [2, up to num_pairs]."""
        for begin in range(0, len(self), num_pairs):
            yield np.array(self._pairs[begin : begin + num_pairs]).T


def write_clusters(path: Path, pair_files: Iterable[Path]) -> None:
    """Join the pairs of near-duplicates to clusters, and write as pairs which document of a cluster is kept: its first.

    Memory: about 200 bytes per document that has a near-duplicate.
    """
    forest = np.empty((2, 0), dtype=np.uint64)
    for pair_file in pair_files:
        for chunk in Pairs(pair_file).chunks(KEYS_PER_PARTITION // 4):
            forest = first_of_cluster(np.concatenate([forest, chunk], axis=1))
    dropped = forest[:, forest[0] != forest[1]]
    with atomic_write(path) as temporary:
        temporary.write_bytes(np.ascontiguousarray(dropped.T).tobytes())


def first_of_cluster(edges: np.ndarray) -> np.ndarray:
    """Connected components of a graph: uint64 [2, edges] -> [2, nodes] of every node and the least of its component."""
    nodes, ends = np.unique(edges, return_inverse=True)
    ends = ends.reshape(2, -1)
    parent = np.arange(len(nodes))
    while True:
        least = parent[ends].min(axis=0)
        before = parent.copy()
        for end in ends:
            np.minimum.at(parent, before[end], least)
            np.minimum.at(parent, end, least)
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]
        if np.array_equal(parent, before):
            return np.stack([nodes, nodes[parent]])
