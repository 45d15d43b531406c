"""Packed sequences: every token of a continuation is predicted once, after its own context, in any layout."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tpt.rl.rows import Rows, Tokens, length_of, mask_of, shuffled

SEQUENCES = [
    Tokens([5, 6, 7], [8, 9]),
    Tokens([3], [4]),
    Tokens([10, 11], [12, 13, 14, 15]),
    Tokens([20], [21, 22]),
]


def test_values_go_to_the_place_that_predicts_their_token() -> None:
    rows = Rows.of(SEQUENCES, 8, 2)
    assert rows.num_rows == 2 and rows.tensors["tokens"].shape == (2, 8)
    expected = torch.zeros(4, 4, dtype=torch.long)
    for b, (_, continuation) in enumerate(SEQUENCES):
        expected[b, : len(continuation)] = torch.tensor(continuation)
    assert torch.equal(rows.take(rows.tensors["labels"]), expected)
    before = [[7, 8], [3], [11, 12, 13, 14], [20, 21]]
    found = rows.take(rows.tensors["tokens"])
    assert [found[b, : len(row)].tolist() for b, row in enumerate(before)] == before


def test_a_row_holds_several_sequences_that_are_told_apart_by_segment_and_position() -> None:
    rows = Rows.of(SEQUENCES, 8, 2)
    segments, positions = rows.tensors["segment_ids"], rows.tensors["position_ids"]
    assert int(segments.max()) == 3
    for row in range(rows.num_rows):
        for segment in range(1, int(segments[row].max()) + 1):
            own = positions[row][segments[row] == segment]
            assert own.tolist() == list(range(len(own)))


def test_rows_are_added_to_make_a_multiple_and_hold_nothing() -> None:
    rows = Rows.of(SEQUENCES, 8, 4)
    assert rows.num_rows == 4
    assert not rows.tensors["segment_ids"][2:].any()
    assert not rows.put(mask_of(SEQUENCES).float())[2:].any()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=9), st.integers(10, 14))
def test_values_survive_the_way_there_and_back(sizes: list[tuple[int, int]], row_length: int) -> None:
    sequences = [Tokens(range(context), range(100, 100 + size)) for context, size in sizes]
    rows, mask = Rows.of(sequences, row_length, 3), mask_of(sequences)
    values = torch.arange(1.0, 1 + mask.numel()).view(mask.shape)
    there = rows.put(values)
    assert torch.equal(rows.take(there), values.where(mask, 0))
    assert int((there != 0).sum()) == int(mask.sum())
    pairs = torch.stack([values, 2 * values])
    assert torch.equal(rows.take(torch.stack([there, 2 * there])), pairs.where(mask, 0))
    assert int((rows.tensors["segment_ids"] > 0).sum()) == sum(map(length_of, sequences))


def test_an_order_depends_on_its_name_alone() -> None:
    assert shuffled(20, "a") == shuffled(20, "a") != shuffled(20, "b")
    assert sorted(shuffled(20, "a")) == list(range(20))
