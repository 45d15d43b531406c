"""Evaluation sets in the layouts of benchmarks: every item is searched for, or reported."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from corpus_files import rejects, sentence, write_jsonl

from megatron_tpt.corpus.decontamination import EvaluationIndex
from megatron_tpt.corpus.evaluation_sets import read_items
from megatron_tpt.corpus.options import EvaluationSet, PrepareOptions
from megatron_tpt.corpus.prepare import prepare
from megatron_tpt.errors import Fault, UserError


def items(path: Path | str, *columns: str) -> list[str]:
    """The texts of the items."""
    return [text for _, text in read_items(EvaluationSet("e", str(path), columns))]


def build(path: Path, *columns: str) -> EvaluationIndex:
    return EvaluationIndex.build([EvaluationSet("e", str(path), columns)], 13, 1)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


ROWS: list[dict[str, Any]] = [
    {
        "question": "which?",
        "choices": ["one", "two"],
        "answer": 1,
        "labelled": {"text": ["a", "b"], "label": ["A", "B"]},
        "turns": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}],
        "a.b": "dotted",
    },
    {
        "question": "how?",
        "choices": [],
        "answer": None,
        "labelled": {"text": ["c"], "label": None},
        "turns": [{"role": "user", "content": None}],
        "a.b": "",
    },
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["question"], ["which?", "how?"]),
        (["question", "choices"], ["which?\none\ntwo", "how?"]),
        (["answer", "question"], ["1\nwhich?", "how?"]),
        (["labelled"], ["a\nb\nA\nB", "c"]),
        (["labelled.text"], ["a\nb", "c"]),
        (["a.b"], ["dotted", ""]),
        (["turns"], ["user\nhi\nassistant\nthere", "user"]),
        (["turns.content"], ["hi\nthere", ""]),
    ],
)
def test_an_item_is_all_text_in_its_columns(
    tmp_path: Path, suffix: str, columns: list[str], expected: list[str]
) -> None:
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[suffix]
    path = write(tmp_path / f"e.{suffix}", ROWS)
    assert items(path, *columns) == expected


def test_empty_items_are_counted_and_named_and_the_others_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"q": sentence(1)}, {"q": ""}, {"q": None}, {"other": 1}, {"q": " ?! "}, {"q": []}, {"q": sentence(2)}]
    path = write_jsonl(tmp_path / "e.jsonl", rows)
    index = build(path, "q")
    assert index.describe()["e"] | {"by_ngrams": 2, "without_words": 5, "items": 7} == index.describe()["e"]
    found = index.find([sentence(2)])[0]
    assert found is not None and found.item == 7
    assert capsys.readouterr().err == (
        f"warning: evaluation set e: 5 of 7 items without a word in q, not searched for "
        f"({path}:2, {path}:3, {path}:4, ...)\n"
    )


def test_every_item_must_be_readable_and_some_must_have_words(tmp_path: Path) -> None:
    for rows, columns, message in [
        ([], ["q"], "has no bytes"),
        ([" "], ["q"], "holds no items of the evaluation set e"),
        ([{"q": ""}, {"q": None}], ["q"], "none of the 2 items of the evaluation set e has a word in q"),
        ([{"q": "x"}, "{broken"], ["q"], r"e\.jsonl:2: not JSON .*fix the line"),
        ([{"q": "x"}, ["q"]], ["q"], r"e\.jsonl:2: not a JSON object"),
        (
            [{"question": "x"}],
            ["text"],
            r"no item has a column 'text'; the columns are question \(give --decontaminate e=",
        ),
        ([{"q": {"a": "x"}}], ["q", "q.b"], r"no item has a column 'q\.b'"),
    ]:
        path = write_jsonl(tmp_path / "e.jsonl", rows)
        with pytest.raises(UserError, match=message) as raised:
            build(path, *columns)
        assert "--on-bad-record" not in str(raised.value)  # no such option here
    table = write_parquet(tmp_path / "e.parquet", [{"q": "x", "image": b"\xff\xd8"}])
    with pytest.raises(UserError, match=r"e\.parquet:1: column 'image' holds bytes"):
        build(table, "q", "image")
    with pytest.raises(UserError, match="no column 'text'; its columns are q, image"):
        build(table, "text")


def raw_corpus(folder: Path, item: str) -> str:
    texts = [f"{sentence(10)} {item} {sentence(11)}", sentence(12)]
    return str(write_jsonl(folder / "raw.jsonl", ({"text": text} for text in texts)))


@pytest.mark.parametrize("layout", ["folder of a data set", "saved data set", "pattern"])
def test_data_sets_are_evaluation_sets(tmp_path: Path, layout: str) -> None:
    rows = [{"question": sentence(seed), "choices": ["a", "b"]} for seed in range(3)]
    if layout == "saved data set":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "mmlu")
        location = f"{tmp_path}/mmlu"
    else:
        write_parquet(tmp_path / "mmlu" / "test-00000-of-00001.parquet", rows)
        location = f"hf://{tmp_path}/mmlu?split=test" if layout.startswith("folder") else f"{tmp_path}/mmlu/*.parquet"
    options = PrepareOptions(
        [raw_corpus(tmp_path, sentence(1))],
        tmp_path / "clean",
        decontaminate=[f"mmlu={location}:question,choices"],
        num_workers=1,
    )
    report = prepare(options)
    assert report.dropped == {"contaminated": 1}
    assert rejects(options.output)[0]["evidence"]["item"] == 2
    assert prepare(options) == report


def test_a_hub_that_cannot_be_reached_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    url = "hf://nobody/nothing/all?split=test"
    options = PrepareOptions([raw_corpus(tmp_path, "x")], tmp_path / "clean", decontaminate=[f"m={url}:question"])
    with pytest.raises((UserError, Fault), match=r"hf://nobody/nothing: cannot be opened .*download the data set"):
        prepare(options)
    assert not (tmp_path / "clean" / "prepare.json").exists()


def test_a_mistake_in_an_evaluation_set_does_not_bind_the_corrected_command(tmp_path: Path) -> None:
    raw, questions = raw_corpus(tmp_path, sentence(1)), write_jsonl(tmp_path / "q.jsonl", [{"question": sentence(1)}])
    wrong, right = (
        PrepareOptions([raw], tmp_path / "clean", decontaminate=[f"q={questions}:{column}"], num_workers=1)
        for column in ("prompt", "question")
    )
    with pytest.raises(UserError, match="no item has a column 'prompt'; the columns are question"):
        prepare(wrong)
    assert prepare(right).dropped == {"contaminated": 1}


def test_a_resumed_job_looks_for_what_it_looked_for_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a data set of the Hub it is not known whether it has changed."""
    folder = tmp_path / "mmlu"
    write_parquet(folder / "test.parquet", [{"question": sentence(1)}])
    url = f"hf://{folder}?split=test"
    options = PrepareOptions(
        [raw_corpus(tmp_path, sentence(1))], tmp_path / "clean", decontaminate=[f"m={url}:question"], num_workers=1
    )

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megatron_tpt.corpus.stages.scan", killed)
        prepare(options)
    write_parquet(folder / "test.parquet", [{"question": sentence(2)}])
    assert prepare(options).dropped == {"contaminated": 1}
