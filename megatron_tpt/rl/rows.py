"""Sequences of different lengths in rows of one length, and values of their tokens there and back.

A sequence is a context (a prompt) and a continuation whose tokens have values: log-probabilities, advantages. Several
sequences share a row, and none sees another. In [B, T] the continuation of sequence b begins at [b, 0]; in rows, [N,
s], a value is where the model predicts its token, which is one place before it.

Sequences that begin alike can be a tree: what they share is in the row once, its trunk, and each branch sees the tokens
of the trunk before the place where it leaves it (training/branches.py).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import numpy
import torch
from torch import Tensor

from megatron_tpt.config.recipe import Recipe
from megatron_tpt.indexing.packing import pack
from megatron_tpt.names import seed_of
from megatron_tpt.objectives.objective import MicroBatch
from megatron_tpt.training.batches import Batch, microbatch_seed

from megatron.core import parallel_state


class Tokens(NamedTuple):
    """A context of one token at least, and its continuation, as token ids."""

    context: Sequence[int]
    continuation: Sequence[int]


class Branch(NamedTuple):
    """A sequence of a tree."""

    num_shared: int
    """The tokens of the trunk that it begins with, fewer than those of its context."""
    tokens: Tokens
    """All of it, what it shares included."""


type Tree = Sequence[Branch]
"""Its trunk is what the branch with the most shared tokens shares; all others share a beginning of that."""


def length_of(sequence: Tokens) -> int:
    """Places that a sequence needs in a row: the last token is only predicted."""
    return len(sequence.context) + len(sequence.continuation) - 1


def length_of_tree(tree: Tree) -> int:
    """Places that a tree needs in a row."""
    return len(_trunk(tree)) + sum(length_of(branch.tokens) - branch.num_shared for branch in tree)


def _trunk(tree: Tree) -> Sequence[int]:
    longest = max(tree, key=lambda branch: branch.num_shared)
    return longest.tokens.context[: longest.num_shared]


def mask_of(sequences: Sequence[Tokens]) -> Tensor:
    """Where there are tokens of continuations: bool [B, T]."""
    lengths = torch.tensor([len(one.continuation) for one in sequences])
    return torch.arange(int(lengths.max())) < lengths[:, None]


class Rows:
    """Packed sequences: the tensors [N, s] of all rows, the same on all ranks."""

    def __init__(self, tensors: dict[str, Tensor], places: Tensor, mask: Tensor) -> None:
        self.tensors = tensors
        self.mask = mask
        """bool [B, T]."""
        self._places = places
        """Of every token of the mask, in its order, the index in a flattened [N, s]."""

    @classmethod
    def of(cls, sequences: Sequence[Tokens], row_length: int, multiple: int) -> Self:
        """Packed first-fit-decreasing; rows without sequences are added to make their number a `multiple`."""
        rows = cls.of_trees([[Branch(0, one)] for one in sequences], row_length, multiple)
        del rows.tensors["branch_ids"], rows.tensors["num_shared"]
        return rows

    @classmethod
    def of_trees(cls, trees: Sequence[Tree], row_length: int, multiple: int) -> Self:
        """Trees, packed in the same way; B counts the branches of all trees."""
        packing = pack(numpy.array([length_of_tree(one) for one in trees]), row_length)
        num_rows = -(-packing.num_rows // multiple) * multiple
        arrays = {name: numpy.zeros((num_rows, row_length), dtype=numpy.int64) for name in _TENSORS}
        places: dict[tuple[int, int], numpy.ndarray] = {}
        for row in range(packing.num_rows):
            begin, views = 0, {name: array[row] for name, array in arrays.items()}
            for segment, number in enumerate(packing.row(row).tolist(), start=1):
                trunk = _trunk(trees[number])
                _put(views, begin, [*trunk, 0], 0, segment, branch_id=0, num_shared=0)  # what it predicts is not used
                begin += len(trunk)
                for branch_id, (num_shared, one) in enumerate(trees[number], start=1):
                    ids = [*one.context[num_shared:], *one.continuation]
                    _put(views, begin, ids, num_shared, segment, branch_id, num_shared)
                    first = row * row_length + begin + len(one.context) - num_shared - 1
                    places[number, branch_id] = numpy.arange(first, first + len(one.continuation))
                    begin += len(ids) - 1
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        flat = numpy.concatenate([places[key] for key in sorted(places)])
        return cls(tensors, torch.from_numpy(flat), mask_of([one.tokens for tree in trees for one in tree]))

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.tensors["tokens"])

    def put(self, values: Tensor) -> Tensor:
        """[B, T] to [N, s]; 0 where no continuation is predicted."""
        flat = torch.zeros(self.tensors["tokens"].numel(), dtype=values.dtype)
        flat[self._places] = values[self.mask]
        return flat.view(self.num_rows, -1)

    def take(self, values: Tensor) -> Tensor:
        """[..., N, s] to [..., B, T]; 0 outside of the mask."""
        flat = values.flatten(-2)[..., self._places]
        result = torch.zeros(*flat.shape[:-1], *self.mask.shape, dtype=values.dtype)
        result[..., self.mask] = flat
        return result


_TENSORS = ("tokens", "labels", "position_ids", "segment_ids", "branch_ids", "num_shared")


def _put(
    row: Mapping[str, numpy.ndarray],
    begin: int,
    ids: Sequence[int],
    first_position: int,
    segment: int,
    branch_id: int,
    num_shared: int,
) -> None:
    """Write a trunk or a branch at `begin` of a row; the last of its ids is only predicted."""
    length = len(ids) - 1
    values = (ids[:-1], ids[1:], numpy.arange(first_position, first_position + length), segment, branch_id, num_shared)
    for name, value in zip(_TENSORS, values, strict=True):
        row[name][begin : begin + length] = value


class Packer:
    """Makes the batches of this rank. Needs process groups."""

    def __init__(self, recipe: Recipe) -> None:
        parallel = recipe.parallel
        self._recipe = recipe
        self._rank = parallel_state.get_data_parallel_rank()
        self._size = parallel_state.get_data_parallel_world_size()
        self._rows_at_once = recipe.training.micro_batch_size * self._size
        interleaved = parallel.virtual_pipeline_parallel_size > 1
        self._multiple = self._rows_at_once * (parallel.pipeline_parallel_size if interleaved else 1)

    def rows(self, sequences: Sequence[Tokens]) -> Rows:
        """Rows of training.sequence_length; longer where a sequence is."""
        return Rows.of(sequences, self._row_length(map(length_of, sequences)), self._multiple)

    def rows_of_trees(self, trees: Sequence[Tree]) -> Rows:
        """The same of trees."""
        return Rows.of_trees(trees, self._row_length(map(length_of_tree, trees)), self._multiple)

    def _row_length(self, lengths: Iterable[int]) -> int:
        unit = self._recipe.parallel.tensor_parallel_size
        return max(self._recipe.training.sequence_length, -(-max(lengths) // unit) * unit)

    def batch(self, rows: Rows, values: Mapping[str, Tensor] | None = None, *, step: int = 0) -> Batch:
        """This rank's part of rows, with further `values` [N, s], as the batch of the step that follows `step` others.
        Micro-batch m of rank r has the rows after those of earlier micro-batches and of lower ranks."""
        tensors = {**rows.tensors, **(values or {})}
        size, numbers = self._recipe.training.micro_batch_size, range(rows.num_rows // self._rows_at_once)
        places = [number * self._size + self._rank for number in numbers]

        def microbatches() -> Iterator[MicroBatch]:
            for place in places:
                yield {name: value[place * size : (place + 1) * size] for name, value in tensors.items()}

        seeds = [microbatch_seed(self._recipe.run.seed, step, place) for place in places]
        return Batch(microbatches(), seeds, int((rows.tensors["segment_ids"] > 0).sum()))

    def gather(self, values: Tensor) -> Tensor:
        """This rank's [..., rows, s], in the order of its batch, to [..., N, s] of all ranks, on the CPU. All ranks
        call it."""
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(self._size)]
        torch.distributed.all_gather(parts, values, group=parallel_state.get_data_parallel_group())
        size = self._recipe.training.micro_batch_size
        split = [part.unflatten(-2, (-1, size)) for part in parts]  # [..., micro-batches, size, s]
        return torch.stack(split, dim=-3).flatten(-4, -2).cpu()


def shuffled(num_items: int, name: str) -> list[int]:
    """0 ... num_items - 1 in an order that depends on the name alone."""
    order: list[int] = numpy.random.RandomState(seed_of(name) % 2**32).permutation(num_items).tolist()
    return order
