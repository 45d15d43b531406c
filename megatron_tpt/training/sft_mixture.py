"""Mixtures of packed indices: how many rows of each an epoch draws, and which."""

import bisect
import itertools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_tpt.names import seed_of

if TYPE_CHECKING:
    from megatron_tpt.indexing.conversations import Example
    from megatron_tpt.training.sft import RowCounts, Rows


class MixedRows:
    """Rows of several sets, of each as many in an epoch as asked for.

    A set is read in random order, from one epoch of the run to the next without a gap, and then again in another order:
    so its rows are read equally often, whatever its share is.
    """

    def __init__(self, parts: Sequence["Rows"], num_rows: Sequence[int], seed: int) -> None:
        """`num_rows`: those that an epoch draws of each part, at least 1."""
        self._parts, self._num_rows, self._seed = parts, num_rows, seed
        self._ends = list(itertools.accumulate(num_rows))
        self._epoch = 0
        self._orders: dict[tuple[int, int], np.ndarray] = {}  # of the passes through each part that the epoch needs
        kind = type(parts[0].counts)
        shares = [rows / len(part) for part, rows in zip(parts, num_rows, strict=True)]
        columns = zip(*(part.counts for part in parts), strict=True)
        # Of an epoch, as far as rows of a set are alike.
        self.counts: RowCounts = kind(*(round(sum(map(operator.mul, shares, column))) for column in columns))
        self.checksum = ",".join(f"{part.checksum} x {rows}" for part, rows in zip(parts, num_rows, strict=True))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> "list[Example]":
        return self.at(row, 0)

    def at(self, row: int, epoch: int) -> "list[Example]":
        """A row of an epoch."""
        number = bisect.bisect_right(self._ends, row)
        part = self._parts[number]
        drawn = epoch * self._num_rows[number] + row - (self._ends[number - 1] if number else 0)
        reading, place = divmod(drawn, len(part))
        if epoch != self._epoch:
            self._epoch, self._orders = epoch, {}
        if (number, reading) not in self._orders:
            random = np.random.default_rng(seed_of(f"{self._seed}/{number}/{reading}"))
            self._orders[number, reading] = random.permutation(len(part))
        return part[int(self._orders[number, reading][place])]

    def describe(self) -> list[str]:
        """A line for each set: how much of it an epoch draws."""
        return [
            f"an epoch draws {rows:,} of {len(part):,} rows of set {number} ({rows / len(part):.2f} times)"
            for number, (part, rows) in enumerate(zip(self._parts, self._num_rows, strict=True), start=1)
        ]
