"""A rank's part of the global batch of an optimizer step: its micro-batches, each with a random seed."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch

from megatron_tpt.names import seed_of
from megatron_tpt.objectives.objective import MicroBatch
from megatron_tpt.training.data import Loader
from megatron_tpt.training.phases import phase


class Batch:
    """The micro-batches of a step on this rank, read on demand and kept, so that a step can be recomputed and several
    chunks of a model can iterate over the same. A batch without micro-batches means that the step is skipped.

    Each micro-batch has a `seed`, int64 [], for anything random in it. It depends only on the run's seed, the step and
    the place in the global batch, so that resume, roll-back and re-run repeat it. (Dropout draws from the random
    streams of Megatron Core instead, whose states a checkpoint holds and a re-run restores.)
    """

    num_taken: ClassVar[int] = 0
    """Micro-batches that this process has taken from any batch; the watchdog reads it as progress."""

    def __init__(self, microbatches: Iterable[MicroBatch], seeds: Sequence[int], num_tokens: int) -> None:
        self.seeds = tuple(seeds)
        """One for each micro-batch; at most this many are read from `microbatches`."""
        self.num_tokens = num_tokens
        """Tokens of the whole global batch."""
        self.waited_s = 0.0
        """Time spent waiting for the micro-batches."""
        self._source = iter(microbatches)
        self._kept: list[MicroBatch] = []

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[MicroBatch]:
        for place in range(len(self)):
            if place == len(self._kept):
                self._kept.append({**self._take(), "seed": torch.tensor(self.seeds[place])})
            Batch.num_taken += 1
            yield self._kept[place]

    @phase("waiting for data")
    def _take(self) -> MicroBatch:
        begin = time.perf_counter()
        try:
            return next(self._source)
        finally:
            self.waited_s += time.perf_counter() - begin


def microbatch_seed(run_seed: int, step: int, place: int) -> int:
    """The seed of a micro-batch by its place in the global batch of the step that follows `step` others: 0 <= seed <
    2**63."""
    return seed_of(f"{run_seed}/{step}/{place}")


def take_batch(loader: Loader, microbatches: Iterator[MicroBatch], step: int, run_seed: int) -> Batch:
    """The batch of the step that follows `step` others; its micro-batches are the next that the loader yields."""
    places = (
        microbatch * loader.data_parallel_size + loader.data_parallel_rank
        for microbatch in range(loader.num_microbatches(step))
    )
    num_tokens = loader.training.batch_size(step) * loader.training.sequence_length
    return Batch(microbatches, [microbatch_seed(run_seed, step, place) for place in places], num_tokens)
