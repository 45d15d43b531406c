"""How examples of different lengths are placed in rows of a fixed length."""

from typing import NamedTuple

import numpy


class Packing(NamedTuple):
    """Which example is in which row."""

    order: numpy.ndarray
    """The examples row by row, int64 [num_examples]."""
    bounds: numpy.ndarray
    """Where each row begins in `order`, and its length at the end: int64 [num_rows + 1]."""

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return len(self.bounds) - 1

    def row(self, number: int) -> numpy.ndarray:
        """The examples of one row."""
        return self.order[self.bounds[number] : self.bounds[number + 1]]


def pack(lengths: numpy.ndarray, capacity: int) -> Packing:
    """First-fit-decreasing: the longest example first, each into the first row that has room. O(n log n).

    lengths [n], from 1 to `capacity`. Never more than 11/9 of the fewest rows possible, plus 6/9 (Dosa, 2007).
    """
    lengths = numpy.asarray(lengths, dtype=numpy.int64)
    if not len(lengths):
        return Packing(numpy.zeros(0, dtype=numpy.int64), numpy.zeros(1, dtype=numpy.int64))
    assert lengths.min() >= 1 and lengths.max() <= capacity
    # At most one row stays half empty, or its content would have gone into another such row.
    max_rows = min(len(lengths), 2 * int(lengths.sum()) // capacity + 1)
    num_leaves = 1 << (max_rows - 1).bit_length()
    # A binary tree over the rows, the root at 1, the children of i at 2i and 2i + 1: the most room below each node.
    room = [capacity] * (2 * num_leaves)
    by_length = numpy.argsort(-lengths, kind="stable")
    rows = []
    for length in lengths[by_length].tolist():
        node = 1
        while node < num_leaves:
            node *= 2
            if room[node] < length:
                node += 1
        rows.append(node - num_leaves)
        room[node] -= length
        while node > 1:
            most = max(room[node], room[node ^ 1])
            node //= 2
            if room[node] == most:
                break
            room[node] = most
    row_of = numpy.array(rows)
    bounds = numpy.concatenate([[0], numpy.cumsum(numpy.bincount(row_of))])
    return Packing(by_length[numpy.argsort(row_of, kind="stable")], bounds)
