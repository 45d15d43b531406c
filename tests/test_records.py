"""Records: what is read, what is refused, and that written records come back."""

import gzip
import itertools
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_tpt.errors import UserError
from megatron_tpt.records import (
    SUFFIXES,
    ReadCounts,
    Record,
    content_id,
    expand_inputs,
    read_records,
    write_records,
)

RECORDS = [
    Record("a", "Zwölf Äpfel\u2028and a line separator", "think\nthink", {"generator": "m", "truncated": False}),
    Record("b", "plain"),
    Record(content_id("no id"), "no id", None, {"n": [1, {"x": None}]}),
]


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_written_records_come_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"records{suffix}"
    many = [Record(str(i), f"document {i}", meta={"i": i}) for i in range(3000)]
    assert write_records(path, RECORDS + many) == 3003
    assert list(read_records([path])) == RECORDS + many
    first = path.read_bytes()
    write_records(path, RECORDS + many)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_write_leaves_nothing(tmp_path: Path) -> None:
    def records():
        yield RECORDS[0]
        raise RuntimeError("generator failed")

    for suffix in SUFFIXES:
        with pytest.raises(RuntimeError):
            write_records(tmp_path / f"x{suffix}", records())
    with pytest.raises(UserError, match="written to"):
        write_records(tmp_path / "x.csv", RECORDS)
    assert not list(tmp_path.iterdir())


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "one"}, {"text": "two"}, "no json")
    assert [r.text for r in itertools.islice(read_records([path]), 2)] == ["one", "two"]


def test_columns_are_chosen_and_joined(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"question": "1+1?", "answer": "2", "n": 7})
    record = next(read_records([path], text_column="question,answer", id_column="n"))
    assert (record.id, record.text) == ("7", "1+1?\n2")
    assert next(read_records([path], text_column="answer")).id == content_id("2")


def test_limit_counts_good_records(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "one"}, "bad", {"text": "two"}, "bad", {"text": "three"})
    counts = ReadCounts()
    texts = [r.text for r in read_records([path], on_bad_record="skip", limit=2, counts=counts)]
    assert texts == ["one", "two"]
    assert counts.read == 2 and counts.skipped == {"not JSON": 1}


BAD_LINES = [
    (b"{no json", "not JSON"),
    (b"[1]", "not a JSON object"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"texts": "x"}', "no text"),
    (b'{"text": null}', "no text"),
    (b'{"text": 3}', "column 'text' is not a string"),
    (b'{"text": ""}', "empty text"),
    (b'{"text": " \\n\\t"}', "empty text"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "column 'text' holds half a surrogate pair"),
    (b'{"text": "x", "thinking": ["y"]}', "column 'thinking' is not a string"),
    (b'{"text": "x", "id": {}}', "id is neither string nor number"),
    (b'{"text": "x", "id": true}', "id is neither string nor number"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_stops_with_its_place_or_is_skipped_and_counted(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good too"}')
    with pytest.raises(UserError) as error:
        list(read_records([path]))
    assert str(error.value).startswith(f"{path}:3: {reason}")
    assert "\n" not in str(error.value)
    counts = ReadCounts()
    texts = [r.text for r in read_records([path], on_bad_record="skip", counts=counts)]
    assert texts == ["good", "good too"]
    assert counts.read == 2 and counts.skipped == {reason: 1}


def test_an_id_column_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "x"})
    with pytest.raises(UserError, match="no id in column 'key'"):
        list(read_records([path], id_column="key"))


def test_foreign_meta_and_blank_thinking_are_left(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "x", "meta": "web", "thinking": " "}, {"text": "y", "meta": "{"})
    assert [(r.thinking, r.meta) for r in read_records([path])] == [(None, {}), (None, {})]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\r\n{"text": "y"}\r\n')
    assert [r.text for r in read_records([path])] == ["x", "y"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("part", ["half", "garbage"])
def test_a_damaged_file_is_named_and_never_skipped(tmp_path: Path, suffix: str, part: str) -> None:
    path = tmp_path / f"x{suffix}"
    write_records(path, (Record(str(i), content_id(str(i)) * 20) for i in range(5000)))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if part == "half" else b"garbage" * 100)
    with pytest.raises(UserError) as error:
        list(read_records([path], on_bad_record="skip"))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_compressed_files_of_several_parts_are_read_whole(tmp_path: Path) -> None:
    lines = [b'{"text": "one"}\n{"text": "t', b'wo"}\n']
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(gzip.compress(line) for line in lines))
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(zstandard.compress(line) for line in lines))
    assert [r.text for r in read_records([tmp_path])] == ["one", "two"] * 2


def test_parquet_from_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"content": ["one", None], "score": [1.0, 2.0], "meta": [{"k": 1}, {"k": 2}]})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(UserError, match=r"x.parquet: no column 'text'; its columns are content, score, meta"):
        list(read_records([path], on_bad_record="skip"))
    with pytest.raises(UserError, match=r"x.parquet:2: no text"):
        list(read_records([path], text_column="content"))
    assert next(read_records([path], text_column="content")).meta == {"k": 1}


def test_folders_are_expanded_and_wrong_inputs_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in [
        "b.jsonl",
        "a.parquet",
        "sub/c.jsonl.gz",
        ".tmp-1-d.jsonl",
        ".hidden/e.jsonl",
        "summary.json",
    ]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"loss": 1}\n' if name == "summary.json" else "\n")
    names = [str(path.relative_to(folder)) for path in expand_inputs([folder])]
    assert names == ["a.parquet", "b.jsonl", "sub/c.jsonl.gz"]
    with pytest.raises(UserError, match="no such file"):
        expand_inputs([tmp_path / "missing.jsonl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no record files"):
        expand_inputs([tmp_path / "empty"])
    with pytest.raises(UserError, match="unknown kind"):
        expand_inputs([Path(__file__)])
    with pytest.raises(UserError, match="no input"):
        expand_inputs([])
    with pytest.raises(UserError, match="text column"):
        list(read_records([folder / "b.jsonl"], text_column="a,,b"))
