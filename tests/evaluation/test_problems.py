"""Problems from every kind of file, with the place of what is wrong."""

import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.evaluation.problems import Problem, read_problems

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
    assert problems(path) == [
        Problem("1", "1+1", "2", f"{path}:1"),
        Problem("2", "1/2", "0.5", f"{path}:2"),
    ]
    assert problems(path, limit=1) == problems(path)[:1]


def test_problems_of_several_files_are_told_by_their_places(tmp_path: Path) -> None:
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
        ("a.jsonl.gz", b"", r"a\.jsonl\.gz: damaged or truncated .*; make or fetch the file again"),
        ("a.csv", b"prompt,answer\n", r"a\.csv: unknown kind of file; records are read from \.jsonl"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        problems(tmp_path / name)
