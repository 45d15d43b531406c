import itertools
import random
from pathlib import Path

import parcels
import pytest
from parcels import LENGTHS, ParcelsOptions, Route

from megatron_tpt.errors import UserError
from megatron_tpt.grading import Grader, Item, Reading, Rules
from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.records import write_json_lines
from megatron_tpt.rl.repro import choose_cuts

ROUTE = Route((6, 2, 4, 3, 2))
HERE = Path(parcels.__file__).parent


def test_the_answer_has_the_days_after_legs_that_are_asked_and_after_the_last() -> None:
    assert ROUTE.question == "A parcel leaves on Mon:\na+6\nb+2\nc+4\nd+3\ne+2\nWhich days?\n"
    assert parcels.think(ROUTE.steps) == "<think>\na+6 Sun.\nb+2 Tue.\nc+4 Sat.\nd+3 Tue.\ne+2 Thu.\n</think>\n"
    assert ROUTE.right_answer == "Tue Thu"
    assert Route.from_document(ROUTE.question) == ROUTE
    assert [len(Route((1,) * legs).right_answer.split()) for legs in LENGTHS] == [2, 2, 2, 3, 3, 3, 4]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parcels") / "data"
    parcels.write_parcels(ParcelsOptions(folder, num_examples=2000, num_prompts=500, num_problems=20))
    return folder


def questions(folder: Path, name: str) -> list[str]:
    rows = parcels.read_rows(folder / f"{name}.jsonl")
    return [row["messages"][0]["content"] if name == "warm" else row["prompt"] for row in rows]


def test_no_parcel_is_in_two_sets(written: Path) -> None:
    found = {name: questions(written, name) for name in ("problems", "prompts", "warm")}
    assert len(found["problems"]) == len(set(found["problems"])) == 20 * len(LENGTHS)
    assert len(found["prompts"]) == len(set(found["prompts"])) > 300 and len(found["warm"]) == 2000
    for first, second in itertools.combinations(found.values(), 2):
        assert not set(first) & set(second)
    for name, own in found.items():
        assert {Route.from_document(one).part for one in own} == {name}
        assert {len(Route.from_document(one).num_days) for one in own} == set(LENGTHS)


def test_a_parcel_in_two_sets_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Route, "part", property(lambda route: "problems"))
    monkeypatch.setattr(parcels, "draw_routes", lambda draw, part=None: itertools.cycle(every_length()))
    with pytest.raises(RuntimeError, match="the same parcel is in problems and prompts"):
        parcels.write_parcels(ParcelsOptions(tmp_path / "data", num_examples=7, num_prompts=7, num_problems=1))


def every_length() -> list[Route]:
    return [Route((1,) * legs) for legs in LENGTHS]


def test_more_problems_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"only \d\d parcels of 3 legs may be problems"):
        parcels.draw_problems(100, random.Random(0))


def test_the_warm_start_repeats_steps_and_answers_some_thinking_early(written: Path) -> None:
    early, extra, steps = 0, 0, 0
    rows = list(parcels.read_rows(written / "warm.jsonl"))
    for row in rows:
        question, *said = row["messages"]
        route = Route.from_document(question["content"])
        assert said[-1]["content"].endswith(f"Answer: {route.right_answer}") and said[-1]["weight"] == 1
        if len(said) == 2:
            early += 1
            assert said[0]["weight"] == 0
            continue
        thinking = said[0]["content"].partition("</think>")[0].removeprefix("<think>\n").splitlines(keepends=True)
        assert [step for step, _ in itertools.groupby(thinking)] == route.steps
        extra, steps = extra + len(thinking) - len(route.steps), steps + len(route.steps)
    assert early / len(rows) == pytest.approx(parcels.CUT, abs=0.03)
    assert extra / steps == pytest.approx(parcels.REPEATED / (1 - parcels.REPEATED), abs=0.03)


def test_every_word_is_a_token_and_every_step_a_segment(written: Path) -> None:
    tokenizer = Tokenizer(written / "tokenizer")
    text = parcels.think(ROUTE.steps)
    ids = tokenizer.encode_tagged(text)
    assert len(ids) == 2 + 3 * len(ROUTE.steps) + 2
    assert len(tokenizer.encode(f" {ROUTE.right_answer}")) == 2
    cuts = choose_cuts([tokenizer.decode([id]) for id in ids], [1.0] * len(ids), 20)
    assert cuts.is_closed and len(cuts.positions) == len(ROUTE.steps) + 1
    assert all(tokenizer.decode(ids[:cut]).endswith("\n") for cut in cuts.positions[1:-1])


def test_the_thinking_of_an_early_answer_is_not_learned(written: Path, tmp_path: Path) -> None:
    rows = list(itertools.islice(parcels.read_rows(written / "warm.jsonl"), 100))
    write_json_lines(tmp_path / "warm.jsonl", rows)
    pack_sft(
        PackOptions(
            input=[tmp_path / "warm.jsonl"],
            tokenizer=written / "tokenizer",
            output=tmp_path / "packed",
            num_workers=1,
            sequence_length=128,
            chat_template=HERE / "chat_template.jinja",
        )
    )
    index, tokenizer = PackedIndex(tmp_path / "packed"), Tokenizer(written / "tokenizer")
    learned = {
        tokenizer.decode(one.tokens.tolist()): tokenizer.decode(one.tokens[one.has_loss].tolist())
        for place in range(len(index))
        for one in index[place]
    }
    expected = {
        "".join(one["content"] for one in row["messages"]) + "<|endoftext|>": row["messages"][-1]["content"]
        + "<|endoftext|>"
        for row in rows
    }
    assert learned == expected and any(text.startswith("Answer") for text in learned.values())


def test_the_seed_decides_the_parcels(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ParcelsOptions(tmp_path / name, num_examples=20, num_prompts=20, num_problems=2, seed=seed)
        parcels.write_parcels(options)
        texts.append([(tmp_path / name / f"{part}.jsonl").read_text() for part in ("problems", "prompts", "warm")])
        assert Tokenizer(tmp_path / name / "tokenizer").fingerprint == Tokenizer(tmp_path / "a/tokenizer").fingerprint
    assert texts[0] == texts[1] and all(one != other for one, other in zip(texts[1], texts[2], strict=True))


def test_right_answers_are_graded_as_right() -> None:
    grader = Grader(Rules("exact", Reading(pattern="Answer: (.*)")))
    for answer, is_right in ((ROUTE.right_answer, True), ("Tue Fri", False), ("Tue", False)):
        assert grader.grade(Item(f"<think>\n</think>\nAnswer: {answer}", ROUTE.right_answer)).correct is is_right
