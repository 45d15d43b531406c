"""Columns of tables and JSON: types that hold text, paths into objects, ids of any type, what is missing or double."""

import datetime
import decimal
import json
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.blocks import Block, read_source
from megatron_tpt.indexing.join import Join
from megatron_tpt.indexing.pieces import PieceMaker
from megatron_tpt.records import Columns, Source, content_id, expand_sources, read_blocks, read_records

TEXTS = ["one", "zwei é", "one"]


def write(path: Path, table: pyarrow.Table) -> Source:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    (source,) = expand_sources([path])
    return source


def texts_and_problems(source: Source, columns: Columns) -> list[str | None]:
    """Of every row the text or the problem: of records, after the index's way was found to agree."""
    rows = [row for _, rows in read_blocks(source, columns, 100, lambda _: True) for row in rows]
    maker = PieceMaker(columns, Join.document_only, "skip")
    blocks = (block for block in read_source(source, columns, 1 << 20) if isinstance(block, Block))
    made = [pieces for block in blocks for _, pieces in maker.make(block.rows)]
    indexed = [text for pieces in made for text in pieces.texts.to_pylist()]
    assert indexed == [row.record.text for row in rows if row.record]
    skipped = sum((pieces.skipped for pieces in made), Counter[str]())
    assert skipped == Counter(row.problem for row in rows if row.problem)
    return [row.record.text if row.record else row.problem for row in rows]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    "type",
    [pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(), pyarrow.large_binary()],
    ids=str,
)
def test_every_type_of_column_that_holds_text_is_read(tmp_path: Path, type: pyarrow.DataType, suffix: str) -> None:
    values = [text.encode() for text in TEXTS] if "binary" in str(type) else TEXTS
    table = pyarrow.table({"text": pyarrow.array([*values, None], type)})
    assert texts_and_problems(write(tmp_path / f"x{suffix}", table), Columns()) == [*TEXTS, "no text"]


def test_dictionaries_of_text_are_read(tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array([*TEXTS, None, " "]).dictionary_encode()})
    for suffix in (".arrow", ".parquet"):
        assert texts_and_problems(write(tmp_path / f"x{suffix}", table), Columns()) == [*TEXTS, "no text", "empty text"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([["a"], []], "column 'text' is not a string"),
        ([{"body": "a"}], "column 'text' is not a string"),
        ([1, 2], "column 'text' is not a string"),
        ([b"\xff"], "column 'text' holds bytes"),
        ([datetime.timedelta(1)], "column 'text' is not a string"),
    ],
)
def test_columns_of_other_types_are_refused_by_name(tmp_path: Path, values: list[Any], problem: str) -> None:
    source = write(tmp_path / "x.parquet", pyarrow.table({"text": values}))
    assert texts_and_problems(source, Columns()) == [problem] * len(values)
    if isinstance(values[0], dict):
        with pytest.raises(UserError, match=r"but an object; name one of its fields, as in 'text\.body'"):
            list(read_records([str(source.path)]))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl"])
def test_a_path_names_a_field_of_an_object(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, Any]] = [
        {"doc": {"body": "a", "id": 7, "more": {"title": "T"}}, "a.b": "plain", "k": 1},
        {"doc": {"body": None, "id": 8, "more": None}, "a.b": "plain", "k": 2},
        {"doc": None, "a.b": "plain", "k": 3},
    ]
    source = write(tmp_path / f"x{suffix}", pyarrow.Table.from_pylist(rows))
    assert texts_and_problems(source, Columns("doc.body")) == ["a", "no text", "no text"]
    assert texts_and_problems(source, Columns("doc.more.title,doc.body", "doc.id")) == ["T\na", "no text", "no text"]
    assert texts_and_problems(source, Columns("a.b")) == ["plain"] * 3
    (record,) = read_records([str(source.path)], text_column="doc.body", id_column="doc.id", meta_columns=["doc.more"],
                             limit=1)  # fmt: skip
    assert (record.id, record.meta) == ("7", {"doc.more": {"title": "T"}})


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_that_a_table_lacks_or_has_twice_are_refused(tmp_path: Path, suffix: str) -> None:
    table = pyarrow.table([["a"], ["b"], ["c"], [{"body": "d"}]], names=["text", "text", "other", "doc"])
    source = write(tmp_path / f"x{suffix}", table)
    for columns, words in (
        (Columns(), "has 2 columns called 'text'"),
        (Columns("other", "key"), "no column 'key'; its columns are text, text, other, doc"),
        (Columns("doc.title"), "no column 'doc.title'"),
        (Columns("other.title"), "no column 'other.title'"),
    ):
        with pytest.raises(UserError, match=words):
            list(read_blocks(source, columns, 10, lambda _: True))
        with pytest.raises(UserError, match=words):
            list(read_source(source, columns, 1000))
    assert texts_and_problems(source, Columns("other")) == ["c"]


IDS: list[tuple[Any, str]] = [
    (7, "7"),
    (2**62, str(2**62)),
    (1.5, "1.5"),
    ("x", "x"),
    (b"key", "key"),
    (decimal.Decimal("1.50"), "1.50"),
    (datetime.date(2020, 1, 2), "2020-01-02"),
    (None, content_id("text")),
    (float("nan"), content_id("text")),
]


@pytest.mark.parametrize(("id", "expected"), IDS, ids=lambda value: repr(value)[:20])
def test_ids_of_every_simple_type_become_strings(tmp_path: Path, id: Any, expected: str) -> None:
    source = write(tmp_path / "x.parquet", pyarrow.table({"text": ["text"], "id": [id]}))
    assert texts_and_problems(source, Columns()) == ["text"]
    assert [record.id for record in read_records([str(source.path)])] == [expected]


def test_uuids_are_ids(tmp_path: Path) -> None:
    key = uuid.UUID("12345678-1234-5678-1234-567812345678")
    source = write(
        tmp_path / "x.arrow", pyarrow.table({"text": ["a"], "id": pyarrow.array([key.bytes], pyarrow.uuid())})
    )
    assert [record.id for record in read_records([str(source.path)])] == [str(key)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize(("id", "kind"), [(True, "a Boolean"), ([1], "a list"), ({"a": 1}, "an object")])
def test_ids_that_name_nothing_are_refused_by_name(tmp_path: Path, id: Any, kind: str, suffix: str) -> None:
    source = write(tmp_path / f"x{suffix}", pyarrow.table({"text": ["text"], "id": [id]}))
    assert texts_and_problems(source, Columns()) == ["id is neither string nor number"]
    with pytest.raises(UserError, match=rf":1: id is neither string nor number but {kind} \(name another id column\)"):
        list(read_records([str(source.path)]))
