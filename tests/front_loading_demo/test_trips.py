"""The language of the miniature of front-loading: what its sets hold, and that they are kept apart."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trips
from tokenizer import make_tokenizer
from trips import RINGS, Trip, TripOptions

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.tokenizer import Tokenizer

TRIP = Trip("days", 0, (3, 1, 5, 2, 2, 4))
SMALL = {"num_base": 300, "num_ldq": 2000, "num_shq": 200, "num_problems": 50}
STEP = re.compile(r"(?=\b(\w+) [a-f]\+(\d) (\w+))")


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trips")
    trips.write_trips(TripOptions(folder, **SMALL))
    return folder


def solved(question: str) -> str:
    """Where a trip ends, counted one place after the other."""
    start, *legs = question.split()[:-1]
    (ring,) = (words for words in RINGS.values() if start in words)
    place = ring.index(start)
    for leg in legs:
        for _ in range(int(leg[2:])):
            place = place + 1 if place + 1 < len(ring) else 0
    return ring[place]


def test_a_trip_is_told_with_every_step_or_none() -> None:
    assert TRIP.question == "Mon a+3 b+1 c+5 d+2 e+2 f+4 ?\n"
    assert TRIP.reasoning == "Mon a+3 Thu b+1 Fri c+5 Fri d+2 Tue e+2 Thu f+4 Wed\nAnswer: Wed"
    assert TRIP.answer == "Answer: Wed" and solved(TRIP.question) == "Wed"


def test_a_misread_trip_differs_in_one_leg_and_ends_elsewhere() -> None:
    for seed in range(50):
        wrong = TRIP.misread(random.Random(seed))
        assert sum(a != b for a, b in zip(TRIP.legs, wrong.legs, strict=True)) == 1
        assert wrong.stops[-1] != TRIP.stops[-1]


def test_no_trip_of_six_legs_is_in_two_sets_or_twice_in_one(folder: Path) -> None:
    found = {name: trips.questions_in(folder / f"{name}.jsonl") for name in trips.BUCKETS}
    assert {name: len(found[name]) for name in ("ldq", "shq", "problems")} == {"ldq": 2000, "shq": 200, "problems": 50}
    assert len(found["base"]) > 100
    every = [question for questions in found.values() for question in questions]
    assert len(set(every)) == len(every)


def test_the_hash_of_a_question_decides_where_it_may_be_with_any_seed(tmp_path: Path) -> None:
    trips.write_trips(TripOptions(tmp_path, **SMALL, seed=1))
    for name, buckets in trips.BUCKETS.items():
        for question in trips.questions_in(tmp_path / f"{name}.jsonl"):
            start, *legs = question.split()[:-1]
            (ring,) = (ring for ring, words in RINGS.items() if start in words)
            assert Trip(ring, RINGS[ring].index(start), tuple(int(leg[2:]) for leg in legs)).bucket in buckets


def test_a_problem_among_the_training_data_is_found(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "problems.jsonl").write_text((folder / "problems.jsonl").read_text())
    leaked = rows_of(folder, "problems")[3]["prompt"]
    document = json.dumps({"text": f"red a+1 ?\nAnswer: blue\n{leaked}Answer: red"})
    (tmp_path / "base.jsonl").write_text((folder / "base.jsonl").read_text() + f"{document}\n")
    with pytest.raises(RuntimeError, match=r"the same trip is in .*problems.jsonl and .*base.jsonl"):
        trips.check_apart([tmp_path / "problems.jsonl", tmp_path / "base.jsonl"])


def test_the_base_corpus_has_right_answers_and_no_step(folder: Path) -> None:
    lines = [line for row in rows_of(folder, "base") for line in row["text"].split("\n")]
    assert len(lines) == 300 * 2 * trips.TRIPS_OF_DOCUMENT
    assert all(
        answer == f"Answer: {solved(question)}" for question, answer in zip(lines[::2], lines[1::2], strict=True)
    )
    lengths = Counter(len(line.split()) - 2 for line in lines[::2])
    assert set(lengths) == {1, 2, 3, 4, 5, 6} and min(lengths.values()) > 100
    assert Counter(ring for line in lines[::2] for ring, words in RINGS.items() if line.split()[0] in words).keys() == (
        RINGS.keys()
    )


def test_shq_has_every_step_all_right_and_leaves_a_ring_out(folder: Path) -> None:
    rows = rows_of(folder, "shq")
    for row in rows:
        assert row["answer"].endswith(f" {solved(row['question'])}") and len(STEP.findall(row["answer"])) == 6
        for start, places, stop in STEP.findall(row["answer"]):
            assert solved(f"{start} a+{places} ?") == stop
    shares = Counter(ring for row in rows for ring, words in RINGS.items() if row["question"].split()[0] in words)
    assert shares.keys() == {"days", "colors", "rooms"} and shares["days"] > shares["colors"] > shares["rooms"]


def test_ldq_has_all_rings_and_mixed_quality(folder: Path) -> None:
    rows = rows_of(folder, "ldq")
    shares = Counter(ring for row in rows for ring, words in RINGS.items() if row["question"].split()[0] in words)
    assert shares.keys() == RINGS.keys() and min(shares.values()) > 100
    right = sum(row["answer"].endswith(f" {solved(row['question'])}") for row in rows)
    assert right / len(rows) == pytest.approx(1 - trips.WRONG / 100, abs=0.04)
    words = Counter(len(row["answer"].split()) for row in rows)
    assert words.keys() == {15, 2}  # with all steps, and with none
    assert words[15] / len(rows) == pytest.approx(trips.STEPS / 100, abs=0.04)


def test_problems_are_of_all_rings_alike_and_answered(folder: Path) -> None:
    rows = rows_of(folder, "problems")
    assert set(Counter(row["ring"] for row in rows).values()) == {12, 13}
    assert all(solved(row["prompt"]) == row["answer"] for row in rows)


def test_a_set_does_not_depend_on_the_size_of_another(folder: Path, tmp_path: Path) -> None:
    trips.write_trips(TripOptions(tmp_path, **SMALL | {"num_base": 10, "num_ldq": 50}))
    for name in ("shq", "problems", "words"):
        assert (tmp_path / f"{name}.jsonl").read_text() == (folder / f"{name}.jsonl").read_text()
    assert rows_of(tmp_path, "ldq") == rows_of(folder, "ldq")[:50]


def test_every_word_is_one_token(folder: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer", [row["text"] for row in rows_of(folder, "words")])
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    assert tokenizer.vocab_size == 414  # that of study.yaml
    assert len(tokenizer.encode(TRIP.question)) == 9
    assert [len(tokenizer.encode(text)) for text in (TRIP.reasoning, TRIP.answer)] == [16, 2]


def test_more_trips_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--num-shq: there are not so many trips; ask for fewer"):
        TripOptions(tmp_path, num_shq=100_000)
