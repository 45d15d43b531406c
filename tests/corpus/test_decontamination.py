"""Overlap with evaluation sets: what is found, and what is left alone."""

import tracemalloc
from pathlib import Path

import pytest
from corpus_files import sentence, write_jsonl

from megatron_tpt.corpus import decontamination, words
from megatron_tpt.corpus.decontamination import Contamination, EvaluationIndex
from megatron_tpt.corpus.options import EvaluationSet, PrepareOptions
from megatron_tpt.errors import UserError

LONG = (
    "Ann buys three apples for 12 euros each, and then she sells 2 of them to Ben for 15 euros each; how much is left?"
)
MIDDLE = "How many primes are there below one hundred?"
SHORT = "What is 2 + 2?"


def index_of(tmp_path: Path, *sets: list[str], ngram: int = 13, min_matches: int = 1) -> EvaluationIndex:
    evaluation_sets = [
        EvaluationSet(f"set{i}", str(write_jsonl(tmp_path / f"set{i}.jsonl", ({"q": text} for text in texts))), ("q",))
        for i, texts in enumerate(sets)
    ]
    built = EvaluationIndex.build(evaluation_sets, ngram, min_matches)
    built.save(tmp_path / "index.npz")
    return EvaluationIndex.load(tmp_path / "index.npz")


def find(index: EvaluationIndex, text: str) -> Contamination | None:
    """What is found in a text is the same alone and among others."""
    (alone,) = index.find([text])
    neighbours = [sentence(50), " ".join(text.split()[:5]), "", text, " ".join(text.split()[5:]), "!"]
    assert index.find(neighbours)[3] == alone
    return alone


def around(text: str) -> str:
    return f"{sentence(1, 200)} {text} {sentence(2, 200)}"


def test_a_planted_item_is_found_in_other_case_punctuation_and_spaces(tmp_path: Path) -> None:
    index = index_of(tmp_path, [sentence(3), LONG])
    assert find(index, around(sentence(4))) is None
    found = find(index, around("ANN buys “three”\n\tapples\n for 12 EUROS each — and then: she sells 2 of them"))
    assert found is not None
    assert found.ngram == "ann buys three apples for 12 euros each and then she sells 2"
    assert (found.evaluation_set, found.item, found.matches) == ("set0", 2, {"set0": 3})


def test_one_word_less_than_an_ngram_is_no_match(tmp_path: Path) -> None:
    index = index_of(tmp_path, [LONG])
    words = LONG.split()
    assert find(index, around(" ".join(words[2:14]))) is None
    assert find(index, around(" ".join(words[2:15]))) is not None


def test_short_items_are_found_whole_and_the_shortest_only_alone(tmp_path: Path) -> None:
    index = index_of(tmp_path, [LONG, MIDDLE, SHORT, "!"])
    assert index.describe() == {
        "set0": {"items": 4, "by_ngrams": 1, "as_one_run": 1, "as_whole_document": 1, "without_words": 1}
    }
    found = find(index, around("how many primes are there below ONE hundred"))
    assert found is not None and found.item == 2
    assert find(index, around("how many primes are there below one thousand")) is None
    assert find(index, around(SHORT)) is None
    assert find(index, "what is 2+2") is not None
    assert find(index, "what is 2+2, then?") is None
    assert find(index, "!") is None


def test_min_matches_asks_for_different_ngrams(tmp_path: Path) -> None:
    words = LONG.split()
    index = index_of(tmp_path, [LONG, MIDDLE], min_matches=4)
    assert find(index, around(" ".join(words[:15]))) is None
    assert find(index, around(" ".join(words[:15]) + ". " + " ".join(words[:15]))) is None  # the same three again
    found = find(index, around(" ".join(words[:16])))
    assert found is not None and found.matches == {"set0": 4}
    assert find(index, around(MIDDLE)) is not None  # all of an item is enough


def test_an_item_as_long_as_an_ngram_is_enough_whatever_min_matches_is(tmp_path: Path) -> None:
    item = " ".join(LONG.split()[:13])
    index = index_of(tmp_path, [item], min_matches=5)
    assert index.describe()["set0"]["as_one_run"] == 1
    assert find(index, around(item)) is not None


def test_a_run_over_the_end_of_a_document_is_no_match(tmp_path: Path) -> None:
    words = LONG.split()
    index = index_of(tmp_path, [LONG])
    assert index.find([" ".join(words[:8]), " ".join(words[8:16]), "", " ".join(words[16:])]) == [None] * 4
    assert index.find([]) == []


@pytest.mark.parametrize(("ngram", "min_matches"), [(13, 1), (13, 4), (5, 2)])
def test_a_document_in_chunks_is_judged_as_a_whole(
    tmp_path: Path, ngram: int, min_matches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(tmp_path, [LONG, MIDDLE, SHORT], [sentence(6), SHORT], ngram=ngram, min_matches=min_matches)
    texts = [
        around(LONG),
        around(f"{MIDDLE} {LONG} {LONG} {sentence(6)}"),
        around(" ".join(LONG.split()[:16])),
        around(" ".join(LONG.split()[:14])),
        SHORT,
        f"{SHORT} !!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!",
        around(SHORT),
        sentence(1, 500),
    ]
    expected = index.find(texts)
    assert sum(found is not None for found in expected) >= 4
    for size in (20, 50, 200):
        monkeypatch.setattr(words, "_CHUNK_CHARACTERS", size)
        monkeypatch.setattr(decontamination, "_WORDS_AT_A_TIME", size)
        assert index.find(texts) == expected


def test_memory_does_not_grow_with_a_document(tmp_path: Path) -> None:
    index = index_of(tmp_path, [LONG, sentence(3)])
    text = f"{LONG} {sentence(3)} " * 5000
    tracemalloc.start()
    (found,) = index.find([text])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None and found.matches == {"set0": 13 + 18}
    assert len(text) > 1_000_000 and peak < 20 << 20  # all at once: 69 MB


def test_every_set_that_overlaps_is_named(tmp_path: Path) -> None:
    index = index_of(tmp_path, [sentence(5), LONG], [LONG, sentence(6)])
    found = find(index, around(LONG + " " + sentence(6)))
    assert found is not None
    assert found.matches == {"set0": 13, "set1": 31}
    assert found.evaluation_set == "set0"
    only = find(index, around(sentence(6)))
    assert only is not None and only.evaluation_set == "set1"


def test_evaluation_sets_on_the_command_line(tmp_path: Path) -> None:
    odd = write_jsonl(tmp_path / "a:b=c.jsonl", [])

    def parsed(*texts: str) -> list[EvaluationSet]:
        return PrepareOptions(["x"], tmp_path, decontaminate=list(texts)).evaluation_sets()

    assert parsed(f"e={odd}", f"f={odd}:q,a", "g=x.jsonl") == [
        ("e", str(odd), ("text",)),
        ("f", str(odd), ("q", "a")),
        ("g", "x.jsonl", ("text",)),
    ]
    assert parsed("h=hf://cais/mmlu/all?split=test&revision=v1:question, choices", "i=hf://openai/gsm8k") == [
        ("h", "hf://cais/mmlu/all?split=test&revision=v1", ("question", "choices")),
        ("i", "hf://openai/gsm8k", ("text",)),
    ]
    assert parsed(f"j={odd}:a:b", f"k={tmp_path}/*.jsonl:q", f"l={tmp_path}:q.text") == [
        ("j", str(odd), ("a:b",)),  # a colon in the name of the column
        ("k", f"{tmp_path}/*.jsonl", ("q",)),
        ("l", str(tmp_path), ("q.text",)),
    ]
    for wrong in ("x.jsonl", "=x.jsonl", "e="):
        with pytest.raises(UserError, match="NAME=FILE"):
            parsed(wrong)
    for wrong in ("e=x.jsonl:", "e=x.jsonl:q,", "e=:q", "e=hf://:q"):
        with pytest.raises(UserError, match="a name is missing"):
            parsed(wrong)
    with pytest.raises(UserError, match="another evaluation set"):
        parsed("e=x.jsonl", "e=y.jsonl")
