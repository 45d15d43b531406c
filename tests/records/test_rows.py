"""Rows of any file as plain dictionaries: the same from every format, and bad rows named by their place."""

import bz2
import datetime
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from megatron_tpt.errors import UserError
from megatron_tpt.records import DAMAGED, RawRow, describe, expand_sources, read_rows

ROWS: list[dict[str, Any]] = [
    {"question": "a\nb", "n": 2**60, "turns": [{"role": "user"}, {"role": "é"}]},
    {"question": '[{"}, \\"', "n": None, "turns": []},
    {"question": "c", "n": -1, "turns": None},
]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
PRETTY = b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS)
ARRAY = json.dumps(ROWS, indent=4, ensure_ascii=False).encode()


def zst_frames(data: bytes) -> bytes:
    """Two frames, of which the second names a window that the command-line tool refuses."""
    long_window = zstandard.ZstdCompressionParameters(window_log=29, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=long_window).compressobj()
    return zstandard.compress(data[:40]) + packer.compress(data[40:]) + packer.flush()


def save_table(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    if path.suffix.lower() == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


FILES = {
    "x.jsonl": LINES,
    "x.NDJSON": LINES,
    "lines.json": LINES,
    "array.json": ARRAY,
    "short_array.JSON": b"  " + json.dumps(ROWS).encode(),
    "pretty.json": PRETTY,
    "mark.json": b"\xef\xbb\xbf" + ARRAY,
    "padded.jsonl.gz": gzip.compress(LINES) + b"\0" * 512,
    "members.JSONL.GZ": gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]),
    "array.json.gz": gzip.compress(ARRAY),
    "frames.jsonl.zst": zst_frames(LINES),
    "array.json.zst": zst_frames(ARRAY),
    "streams.jsonl.bz2": bz2.compress(LINES[:40]) + bz2.compress(LINES[40:]),
    "streams.jsonl.xz": lzma.compress(LINES[:40]) + b"\0" * 8 + lzma.compress(LINES[40:]),
    "pretty.json.xz": lzma.compress(PRETTY),
    "x.parquet": None,
    "x.ARROW": None,
}


def rows_of(path: Path, columns: list[str] | None = None) -> list[RawRow]:
    (source,) = expand_sources([path])
    return list(read_rows(source, columns))


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path, content = tmp_path / name, FILES[name]
    save_table(path) if content is None else path.write_bytes(content)
    rows = rows_of(path)
    assert [row.value for row in rows] == ROWS
    assert [row.problem for row in rows] == [None] * 3
    if "pretty" not in name:
        assert [row.number for row in rows] == [0, 1, 2]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.zst", "x.jsonl.bz2", "x.ndjson.xz", "x.parquet", "x.arrow"])
def test_a_packed_file_or_table_of_nothing_is_damaged(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\0" * 512)
    assert [row.problem for row in rows_of(path)] == [DAMAGED]


@pytest.mark.parametrize("content", [ARRAY[:-2], PRETTY[:-1], b"["])
def test_a_json_array_or_object_that_does_not_end_is_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert [row.problem for row in rows_of(path)][-1] == DAMAGED


def test_bad_rows_are_named_by_their_place(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'{"a": 1}\n\n[1]\n{"a": \n\xff\n{"a": "\\ud800"}\n{"b": "\\ud800"}\n{"a": 36893488147419103232}\n'
    )
    (source,) = expand_sources([path])
    rows = list(read_rows(source, ["a"]))
    assert [(row.number, row.problem) for row in rows] == [
        (0, None),
        (2, "not a JSON object"),
        (3, "not JSON"),
        (4, "not UTF-8"),
        (5, "column 'a' holds half a surrogate pair"),
        (6, None),
        (7, None),
    ]
    assert rows[-1].value == {"a": 2**65}
    assert describe(source, rows[1], "fix it") == f"{path}:3: not a JSON object but a list; fix it"


def test_elements_of_an_array_are_rows_whatever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'[{"a": 1}, "text", 3,\n [1, {"b": "]"}], {"a": {}}]\n garbage')
    assert [row.value or row.problem for row in rows_of(path)] == [
        {"a": 1}, *["not a JSON object"] * 3, {"a": {}}, "not JSON"
    ]  # fmt: skip


def test_of_tables_only_the_columns_asked_for_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    day = datetime.date(2020, 1, 1)
    table = pyarrow.table({"a": [{"b": day, "c": 1}], "raw": [b"\xff"], "other": ["x"]})
    pyarrow.parquet.write_table(table, path)
    (row,) = rows_of(path, ["a.b", "raw", "absent"])
    assert row.value == {"a": {"b": day, "c": 1}, "raw": b"\xff"}


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    table = pyarrow.table([["x"], ["y"], ["z"]], names=["a", "a", "b"])
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"x\.arrow: has 2 columns called 'a'"):
        rows_of(path)
    assert [row.value for row in rows_of(path, ["b"])] == [{"b": "z"}]
