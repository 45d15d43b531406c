"""In which data sets a document is: those of its duplicates, which are dropped, belong to the one that is kept.

    .work/datasets/000003.pairs     (document that is kept, bits of data sets), sorted, for partition 3 of the keys

A document is dropped as a duplicate of one that is kept, perhaps from another data set. A stratum is to have its
documents whichever copy came first; so the one that is kept has the names of all data sets that hold it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_tpt.corpus.deduplication import Pairs, sources_of
from megatron_tpt.files import atomic_write

_PAIRS_AT_A_TIME = 1 << 20


def write_origins(path: Path, pairs: Pairs, near: Pairs | None, dataset_of: np.ndarray) -> None:
    """Write what the duplicates in `pairs` say of the documents that are kept for them: uint64 [documents, 2].

    `near` are the near-duplicates among those, `dataset_of` the bit of the data set of each source, uint64 [sources].
    """
    found = np.empty((0, 2), np.uint64)
    for dropped, first in pairs.chunks(_PAIRS_AT_A_TIME):
        kept = near.kept_for(first) if near is not None else first
        bits, own = (dataset_of[sources_of(documents)] for documents in (dropped, kept))
        is_other = bits != own
        found = _merged(np.concatenate([found, np.stack([kept, bits], axis=1)[is_other]]))
    with atomic_write(path) as temporary:
        temporary.write_bytes(np.ascontiguousarray(found).tobytes())


def _merged(rows: np.ndarray) -> np.ndarray:
    """Rows (document, bits), one for each document, sorted."""
    if not len(rows):
        return rows
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    begins = np.flatnonzero(np.concatenate([[True], rows[1:, 0] != rows[:-1, 0]]))
    return np.stack([rows[begins, 0], np.bitwise_or.reduceat(rows[:, 1], begins)], axis=1)


def read_origins(paths: Sequence[Path], begin: int, end: int) -> dict[int, int]:
    """Of the documents from `begin` to before `end` that others are duplicates of, the bits of their data sets."""
    found: dict[int, int] = {}
    for path in paths:
        for document, bits in Pairs(path).between(begin, end).items():
            found[document] = found.get(document, 0) | bits
    return found


def names_of(bits: int, names: Sequence[str]) -> Iterator[str]:
    """The data sets whose bits are set, in their order."""
    return (name for place, name in enumerate(names) if bits >> place & 1)
