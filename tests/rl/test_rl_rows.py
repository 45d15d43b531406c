"""Packed sequences: every token of a continuation is predicted once, after its own context, in any layout."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tpt.rl.rows import Branch, Rows, Tokens, length_of, length_of_tree, mask_of, shuffled
from megatron_tpt.training.steps import _attention_mask

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


TRUNK = [1, 2, 3, 4, 5, 6]
TREES = [
    [Branch(0, Tokens([1, 9], [20])), Branch(5, Tokens([*TRUNK, 9], [21, 22])), Branch(2, Tokens([1, 2, 3], [23]))],
    [Branch(0, Tokens([7], [24, 25, 26]))],
]


def test_what_the_sequences_of_a_tree_share_is_in_its_row_once() -> None:
    rows = Rows.of_trees(TREES, 16, 1)
    assert [length_of_tree(tree) for tree in TREES] == [5 + 2 + 3 + 1, 3]
    [tokens] = rows.tensors["tokens"].tolist()
    assert tokens == [*TRUNK[:5], 1, 9, 6, 9, 21, 3, 7, 24, 25, 0, 0]
    found = rows.take(rows.tensors["labels"])
    assert found.tolist() == [[20, 0, 0], [21, 22, 0], [23, 0, 0], [24, 25, 26]]
    assert rows.tensors["segment_ids"].tolist() == [[1] * 11 + [2] * 3 + [0] * 2]


def test_a_branch_sees_the_tokens_of_its_own_sequence_at_their_places() -> None:
    rows = Rows.of_trees(TREES, 16, 1)
    row = {name: value[0] for name, value in rows.tensors.items()}
    visible = ~_attention_mask(rows.tensors)[0, 0]
    places = rows.take(torch.arange(16)[None])
    sequences = [branch.tokens for tree in TREES for branch in tree]
    for b, (context, continuation) in enumerate(sequences):
        ids = [*context, *continuation]
        for i, place in enumerate(places[b, : len(continuation)].tolist()):
            seen = sorted((int(row["position_ids"][j]), int(row["tokens"][j])) for j in range(16) if visible[place, j])
            assert seen == list(enumerate(ids[: len(context) + i]))


def test_an_order_depends_on_its_name_alone() -> None:
    assert shuffled(20, "a") == shuffled(20, "a") != shuffled(20, "b")
    assert sorted(shuffled(20, "a")) == list(range(20))
