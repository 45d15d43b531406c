"""Problems from every kind of file, with the place of what is wrong."""

import json
import lzma
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.evaluation.problems import Problem, read_problem_set, read_problems

ROWS = [{"prompt": "1+1", "answer": 2, "more": [1]}, {"prompt": "1/2", "answer": 0.5, "more": []}]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def problems(data: str | Path, **options: Any) -> list[Problem]:
    return read_problems(EvaluateOptions(model=["m"], data=data, output=Path("out"), **options))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.JSONL.XZ", "a.json", "a.parquet"])
def test_problems_are_read_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([row | {"answer": str(row["answer"])} for row in ROWS]), path
        )
    else:
        pack = {"a.jsonl.zst": zstandard.compress, "a.JSONL.XZ": lzma.compress}.get(name)
        path.write_bytes(pack(LINES) if pack else json.dumps(ROWS, indent=1).encode())
    answers = ("2", "0.5") if name == "a.parquet" else (2, 0.5)
    assert problems(path) == [
        Problem("1", "1+1", answers[0], f"{path}:1"),  # as the row has it: a number may be an option's
        Problem("2", "1/2", answers[1], f"{path}:2"),
    ]
    assert problems(path, limit=1) == problems(path)[:1]


def test_problems_of_several_files_are_named_by_their_places(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.ndjson"):
        (tmp_path / name).write_bytes(LINES)
    assert [problem.id for problem in problems(tmp_path)] == [
        f"{tmp_path}/{place}" for place in ("a.jsonl:1", "a.jsonl:2", "b.ndjson:1", "b.ndjson:2")
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", LINES + b"{\n", r"a\.jsonl:3: not JSON .*; fix the line"),
        ("a.json", b'[{"prompt": "a", "answer": 1}, 2]', r"a\.json:2: not a JSON object but a number; fix the line"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", r"a\.jsonl\.gz: damaged or truncated .*; make or fetch the file again"),
        ("b.jsonl.gz", b"", r"b\.jsonl\.gz: has no bytes"),
        ("a.csv", b"prompt,answer\n", r"a\.csv: unknown kind of file; records are read from \.jsonl"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        problems(tmp_path / name)


def test_options_are_rendered_after_the_problem_or_where_the_template_names_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "Colour?", "options": ["red", 2], "answer": 1}) + "\n")
    columns: dict[str, Any] = {"prompt_column": "question", "choices_column": "options", "answer_type": "choice"}
    [problem] = problems(path, **columns)
    assert problem.prompt == "Colour?\n(A) red\n(B) 2"
    assert (problem.answer, problem.choices) == (1, ("red", "2"))
    assert problems(path, **columns, prompt_template="{options}; {question}")[0].prompt == "(A) red\n(B) 2; Colour?"


@pytest.mark.parametrize("option", ["prompt_template", "answer_template", "shot_template"])
def test_a_template_with_a_column_that_a_row_lacks_is_named(tmp_path: Path, option: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    words = (
        f"a.jsonl:1: no column 'question', which --{option.replace('_', '-')} names as {{question}}; its columns are"
    )
    with pytest.raises(UserError, match=f"{re.escape(words)} prompt, answer, more"):
        problems(path, few_shot=path, **{option: "Q: {question}"})


def test_references_may_be_lists_and_booleans_or_built_from_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {"prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f", "answer": [1, "2"], "yes": False}
    path.write_text(json.dumps(row) + "\n")
    assert problems(path)[0].answer == [1, "2"]
    assert problems(path, answer_column="yes")[0].answer is False
    [code] = problems(path, answer_template="{test}\\ncheck({entry_point})", code_prefix_column="prompt")
    assert (code.answer, code.code_prefix) == ("def check(f): pass\ncheck(f)", "def f():\n")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"answer": {"a": 1}}, "column 'answer' is neither text nor number"),
        ({"answer": []}, "column 'answer' is an empty list"),
        ({"answer": [[1]]}, "column 'answer' is neither text nor number"),
        ({"answer": 1, "options": "red"}, "column 'options' is not a list of 2 to 10 options"),
        ({"answer": 1, "options": ["red"]}, "column 'options' is not a list of 2 to 10 options"),
        ({"answer": 1}, "no column 'options'"),
    ],
)
def test_references_and_options_of_other_kinds_are_refused(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a"} | row) + "\n")
    with pytest.raises(UserError, match=words):
        problems(path, choices_column="options" if "options" in str(row) + words else None)


@pytest.mark.parametrize(
    ("row", "options", "name"),
    [
        ({"prompt": "a", "answer": None}, {}, "answer"),
        ({"prompt": None, "answer": "1"}, {}, "prompt"),
        ({"prompt": "a", "more": None}, {"answer_template": "{more}"}, "more"),
        ({"prompt": "a", "answer": 1, "choices": {"text": None}}, {"choices_column": "choices.text"}, "choices.text"),
        ({"prompt": "a", "answer": 1, "choices": None}, {"choices_column": "choices.text"}, "choices.text"),
    ],
)
def test_null_is_distinguished_from_a_missing_column(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], name: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:1: column '{name}'.* is null; give it a value or remove the row"):
        problems(path, **options)


def test_rows_are_counted_behind_a_limit_and_a_null_id_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": None, "prompt": "a", "answer": 1}) + "\n" for _ in range(5)))
    found = read_problem_set(EvaluateOptions(model=["m"], data=path, output=Path("out"), limit=2))
    assert ([problem.id for problem in found.problems], found.num_rows) == (["1", "2"], 5)
