import random
from pathlib import Path

import house
import pytest
from house import DOORS, LENGTHS, ROOMS, HouseOptions, Walk

from megatron_tpt.errors import UserError

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
    house.write_house(HouseOptions(tmp_path, num_walks=500, num_problems=50))
    files = {path.name: [row["prompt"] for row in house.read_rows(path)] for path in tmp_path.glob("*.jsonl")}
    problems = files.pop("problems.jsonl")
    assert len(set(problems)) == len(problems) == 50 * len(LENGTHS)
    assert not set(problems) & {prompt for prompts in files.values() for prompt in prompts}
    assert sorted(files) == ["atoms.jsonl", *(f"train_{longest}.jsonl" for longest in LENGTHS)]
    assert len(files["atoms.jsonl"]) == 5 * 5 + 5 * 25 and len(files["train_6.jsonl"]) == 4000
    for longest in LENGTHS:
        assert {len(prompt.split()) - 1 for prompt in files[f"train_{longest}.jsonl"]} == set(range(1, longest + 1))


def test_a_problem_among_the_training_data_is_found(tmp_path: Path) -> None:
    for name, walks in (("problems", [WALK]), ("training", [Walk(1, ("red",)), WALK])):
        house.write_rows(tmp_path / name, walks)
    with pytest.raises(RuntimeError, match=r"the same walk is in .*problems and .*training: 'hall red blue green'"):
        house.check_disjoint(tmp_path / "problems", [tmp_path / "training"])


def test_the_text_alone_decides_what_is_held_out() -> None:
    held_out = [walk.is_held_out for walk in house.all_walks(4)]
    assert held_out == [walk.is_held_out for walk in house.all_walks(4)]
    assert 0.15 < sum(held_out) / len(held_out) < 0.25
    assert not any(walk.is_held_out for walk in house.atoms())


def test_the_seed_decides_the_walks() -> None:
    drawn = [list(house.draw_training(6, 20, random.Random(seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_more_problems_than_are_held_out_are_refused() -> None:
    with pytest.raises(UserError, match=r"only \d+ walks of 3 doors are held out"):
        house.draw_problems(626, random.Random(0))
