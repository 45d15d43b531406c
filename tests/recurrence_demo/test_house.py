import itertools
import random
from pathlib import Path

import house
import pytest
from house import DOORS, LENGTHS, ROOMS, HouseOptions, Walk

from megatron_tpt.errors import UserError
from megatron_tpt.records import write_json_lines

WALK = Walk(0, ("red", "blue", "green"))


def test_a_walk_ends_where_its_doors_lead() -> None:
    # From the hall (0), red leads to 4, blue from there to 2, green from there to 3.
    assert (WALK.prompt, WALK.response) == ("hall red blue green", "study")


def test_a_walk_of_which_one_door_is_not_known_may_end_anywhere() -> None:
    for doors in DOORS.values():
        assert sorted(doors) == list(range(len(ROOMS)))
    for room in range(len(ROOMS)):
        assert len({doors[room] for doors in DOORS.values()}) == len(ROOMS)


def test_the_doors_generate_all_permutations_of_the_rooms() -> None:
    found = todo = {tuple(range(len(ROOMS)))}
    while todo:
        todo = {tuple(door[room] for room in one) for one in todo for door in DOORS.values()} - found
        found = found | todo
    assert len(found) == 120


def test_no_problem_is_training_data(tmp_path: Path) -> None:
    house.write_house(HouseOptions(tmp_path, num_rows=60, num_problems=50))
    files = {path.name: list(house.read_rows(path)) for path in tmp_path.glob("*.jsonl")}
    problems = [row["prompt"].strip() for row in files.pop("problems.jsonl")]
    assert len(set(problems)) == len(problems) == 50 * len(LENGTHS)
    short = [row["prompt"] for row in files.pop("short.jsonl")]
    assert len(set(short)) == 5 * 5 + 5 * 25
    longest_of = {"atoms.jsonl": 2} | {f"train_{longest}.jsonl": longest for longest in LENGTHS}
    assert files.keys() == longest_of.keys() and len(files["train_6.jsonl"]) == 360
    for name, longest in longest_of.items():
        prompts = [message["content"] for row in files[name] for message in row["messages"][::2]]
        assert not set(prompts) & set(problems)
        assert {len(prompt.split()) - 1 for prompt in prompts} == set(range(1, longest + 1))


def test_a_conversation_has_as_many_walks_as_a_row_has_room_for() -> None:
    walks = list(itertools.islice(house.draw_training(6, random.Random(0)), 200))
    rows = list(house.conversations(iter(walks), 10))
    messages = [message for row in rows for message in row["messages"]]
    assert messages == [message for walk in walks for message in walk.messages][: len(messages)]
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    lengths = [sum(len(message["content"].split()) for message in row["messages"]) for row in rows]
    assert all(60 - 8 < length <= 60 for length in lengths)


def test_a_problem_among_the_training_data_is_found(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "problems", [WALK.problem])
    write_json_lines(tmp_path / "training", [{"messages": [*Walk(1, ("red",)).messages, *WALK.messages]}])
    with pytest.raises(RuntimeError, match=r"the same walk is in .*problems and .*training: 'hall red blue green'"):
        house.check_disjoint(tmp_path / "problems", [tmp_path / "training"])


def test_the_text_alone_decides_what_is_held_out() -> None:
    held_out = [walk.is_held_out for walk in house.all_walks(4)]
    assert held_out == [walk.is_held_out for walk in house.all_walks(4)]
    assert 0.15 < sum(held_out) / len(held_out) < 0.25
    assert not any(walk.is_held_out for walk in house.atoms())


def test_the_seed_decides_the_walks() -> None:
    drawn = [list(itertools.islice(house.draw_training(6, random.Random(seed)), 20)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_more_problems_than_are_held_out_are_refused() -> None:
    with pytest.raises(UserError, match=r"only \d+ walks of 3 doors are held out"):
        house.draw_problems(626, random.Random(0))
