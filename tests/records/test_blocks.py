"""Blocks of rows: the same rows however they are asked for, and bad data that never raises."""

import gzip
import itertools
import json
import math
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import orjson
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_tpt.errors import UserError
from megatron_tpt.records import (
    DAMAGED,
    Columns,
    ReadProgress,
    Record,
    Row,
    content_id,
    expand_sources,
    read_blocks,
    read_records,
    write_records,
)
from megatron_tpt.records import lines as lines_module
from megatron_tpt.records import tables as tables_module
from megatron_tpt.records.limits import VARIABLE

PACKERS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}


TEXT = Columns()


def every(_: int) -> bool:
    return True


def all_rows(
    path: Path | str, columns: Columns = TEXT, rows_per_block: int = 10**9, wanted: Callable[[int], bool] = every
) -> list[Row]:
    (source,) = expand_sources([path])
    return [row for _, rows in read_blocks(source, columns, rows_per_block, wanted) for row in rows]


def packed(path: Path, content: bytes) -> Path:
    suffix = path.name.removeprefix(path.name.split(".")[0])
    path.write_bytes(PACKERS[suffix](content))
    return path


# Sets drawn as sets are mostly small and miss the blocks that a short file has.
BLOCKS = st.integers(0, 2**20 - 1).map(lambda bits: {k for k in range(40) if bits >> (k % 20) & 1})
LINES = st.lists(
    st.one_of(
        st.text(max_size=40).map(lambda text: json.dumps({"text": text}).encode()),
        st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")),
        st.sampled_from([b"", b"  ", b"\r", b'{"text": "x"}', b'{"text": "' + b"long " * 30 + b'"}']),
    ),
    min_size=5,
    max_size=30,
)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=LINES,
    end=st.sampled_from([b"", b"\n"]),
    rows_per_block=st.integers(1, 9),
    wanted=BLOCKS,
    num_taken=st.integers(0, 10),
    cut=st.sampled_from([0.3, 0.8, 1, 1, 1, 1]),
    chunk_bytes=st.sampled_from([2, 7, 64, 1 << 20]),
)
def test_wanted_blocks_hold_the_rows_that_reading_everything_gives(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    lines: list[bytes],
    end: bytes,
    rows_per_block: int,
    wanted: set[int],
    num_taken: int,
    cut: float,
    chunk_bytes: int,
) -> None:
    path = packed(tmp_path_factory.mktemp("x") / f"x{suffix}", b"\n".join(lines) + end)
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])  # half of all files are whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines_module, "_CHUNK_BYTES", chunk_bytes)
        patch.setattr(lines_module, "_GZIP_BYTES", chunk_bytes // 2)
        patch.setattr(lines_module, "_SMALL_BYTES", chunk_bytes // 2)
        patch.setenv(VARIABLE, "100")
        check_blocks(path, rows_per_block, wanted, num_taken)
        if cut >= 1:
            assert not any(row.problem == DAMAGED for row in all_rows(path))
            numbers = [row.number for row in all_rows(path)]
            content = (b"\n".join(lines) + end).removeprefix(b"\xef\xbb\xbf").split(b"\n")
            assert numbers == [i for i, line in enumerate(content) if line and not line.isspace()]


def check_blocks(path: Path, rows_per_block: int, wanted: set[int], num_taken: int) -> None:
    rows = all_rows(path)
    (source,) = expand_sources([path])
    asked: list[int] = []

    def is_wanted(block: int) -> bool:
        asked.append(block)
        return block in wanted

    blocks = [(k, list(block)) for k, block in read_blocks(source, TEXT, rows_per_block, is_wanted)]
    assert asked == list(range(len(asked)))
    assert all(k in wanted for k, _ in blocks)
    expected = [row for row in rows if row.number // rows_per_block in wanted]
    assert [row for _, block in blocks for row in block] == expected
    assert all(row.number // rows_per_block == k for k, block in blocks for row in block)
    # What is not taken of a block is skipped, and does not reach into the next.
    parts = [
        (k, list(itertools.islice(block, num_taken)))
        for k, block in read_blocks(source, TEXT, rows_per_block, lambda k: k in wanted)
    ]
    assert parts == [(k, block[:num_taken]) for k, block in blocks]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.integers(0, 40) | st.just(40),
    rows_per_group=st.integers(1, 15),
    rows_per_batch=st.integers(1, 8),
    rows_per_block=st.integers(1, 12),
    wanted=BLOCKS,
    num_taken=st.integers(0, 12),
    suffix=st.sampled_from([".parquet", ".arrow"]),
)
def test_wanted_blocks_of_tables_hold_the_rows_that_reading_everything_gives(
    tmp_path_factory: pytest.TempPathFactory,
    num_rows: int,
    rows_per_group: int,
    rows_per_batch: int,
    rows_per_block: int,
    wanted: set[int],
    num_taken: int,
    suffix: str,
) -> None:
    path = tmp_path_factory.mktemp("x") / f"x{suffix}"
    texts = [None if i % 5 == 3 else f"text {i}" for i in range(num_rows)]
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows_per_group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables_module, "_ROWS_PER_BATCH", rows_per_batch)
        check_blocks(path, rows_per_block, wanted, num_taken)
        rows = all_rows(path)
    assert [row.record and row.record.text for row in rows] == texts
    assert [row.problem for row in rows] == [None if text else "no text" for text in texts]


def test_row_groups_of_unwanted_blocks_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": [content_id(str(i)) for i in range(4000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=1000, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    rows = all_rows(path, rows_per_block=500, wanted=lambda k: k not in (2, 3))
    assert [row.number for row in rows] == [*range(1000), *range(2000, 4000)]
    rows = all_rows(path, rows_per_block=500)
    assert [row.number for row in rows] == list(range(1001))
    assert rows[-1].problem == DAMAGED and rows[-1].record is None


def test_lines_of_unwanted_blocks_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(tmp_path / "x.jsonl.zst", b'{"text": "a"}\n' * 1000)
    parsed = []
    loads = orjson.loads
    monkeypatch.setattr(orjson, "loads", lambda line: parsed.append(line) or loads(line))
    assert len(all_rows(path, rows_per_block=10, wanted=lambda k: k == 50)) == 10
    assert len(parsed) == 10


@pytest.mark.parametrize("suffix", PACKERS)
def test_progress_grows_to_the_size_of_the_file(tmp_path: Path, suffix: str) -> None:
    text = "".join(map(content_id, map(str, range(50_000))))
    lines = (json.dumps({"text": text[i : i + 500]}) for i in range(0, len(text), 500))
    path = packed(tmp_path / f"x{suffix}", "\n".join(lines).encode())
    (source,) = expand_sources([path])
    progress = ReadProgress()
    seen = [progress.num_bytes for _ in read_blocks(source, TEXT, 100, every, progress)]
    assert seen == sorted(seen) and len(set(seen)) > 1
    assert progress.num_bytes == source.num_bytes == path.stat().st_size


def test_progress_in_tables(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 100}), path, row_group_size=10)
    (source,) = expand_sources([path])
    progress = ReadProgress()
    seen = [progress.num_bytes for _ in read_blocks(source, TEXT, 20, every, progress)]
    assert seen == sorted(set(seen)) and progress.num_bytes == source.num_bytes


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_line_without_end_is_refused_without_being_held(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "64MiB")
    path = tmp_path / f"x{suffix}"
    with path.open("wb") as file:
        if suffix == ".jsonl":
            file.write(b'{"text": "a"}\n')
            file.seek(160 << 20)  # a hole reads as zeros
            file.write(b'\n{"text": "b"}\n')
        else:
            part, last = b"a" * (1 << 20), b'\n{"text": "b"}\n'
            packer = (
                zstandard.ZstdCompressor().compressobj()
                if suffix.endswith("zst")
                else gzip.zlib.compressobj(1, wbits=31)
            )
            file.write(packer.compress(b'{"text": "a"}\n'))
            for _ in range(160):
                file.write(packer.compress(part))
            file.write(packer.compress(last) + packer.flush())
    tracemalloc.start()
    rows = all_rows(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row.problem for row in rows] == [None, "record too large", None]
    assert rows[1].num_bytes >= (160 << 20) - 20 and rows[2].number == 2
    assert peak_bytes < 120 << 20


def test_a_text_of_one_long_word_is_read(tmp_path: Path) -> None:
    word = "ß" * (1 << 20)
    path = packed(tmp_path / "x.jsonl.gz", json.dumps({"text": word}, ensure_ascii=False).encode())
    assert [row.record and row.record.text for row in all_rows(path)] == [word]


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from(["\ud800", "\0", "\x85"])
    ),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(st.sampled_from(["id", "text", "thinking", "meta", "k", "other"]), JSON_VALUES),
    ensure_ascii=st.booleans(),
)
def test_whatever_a_line_holds_is_a_problem_or_a_record_that_comes_back(
    tmp_path_factory: pytest.TempPathFactory, fields: dict, ensure_ascii: bool
) -> None:
    folder = tmp_path_factory.mktemp("x")
    line = json.dumps(fields, ensure_ascii=ensure_ascii).encode(errors="surrogatepass")
    (folder / "x.jsonl").write_bytes(line)
    (row,) = all_rows(folder / "x.jsonl", Columns(meta=("k",)))
    if row.record is None:
        assert row.problem and "\n" not in row.problem
        return
    assert row.record.text == fields["text"]
    if "k" in fields:  # exactly, where Python's parser and NaN allow to compare
        assert json.dumps(row.record.meta["k"]) == json.dumps(json.loads(line)["k"])
    for suffix in (".jsonl", ".parquet"):
        write_records(folder / f"y{suffix}", [row.record])
        (back,) = read_records([folder / f"y{suffix}"])
        assert back == Record(row.record.id, row.record.text, row.record.thinking, _without_nan(row.record.meta))


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


POISON = {
    b'{"text": "a\\u0000b\\u0007"}': None,
    b'{"text": "a\x00b"}': "not JSON",
    b"\x00\x00\x00": "not JSON",
    b'{"text": "\xed\xa0\x80"}': "not UTF-8",
    b'{"text": "x", "n": NaN}': None,
    b'{"text": "x", "n": ' + b"9" * 400 + b"}": None,
    b'{"text": "x", "n": ' + b"9" * 5000 + b"}": "integer too large",
    b'{"text": "x", "n": 1e999}': None,
    b'{"text": "x", "n": ' + b"[" * 5000 + b"]" * 5000 + b"}": "nested too deeply",
    b'{"text": ' + b'{"a":' * 100_000: "nested too deeply",
    b'{"text": "x", "id": 1.5}': None,  # tables with missing ids come out of pandas as floats
    b'{"text": "x", "id": false}': "id is neither string nor number",
    b'{"text": "x", "id": "\\ud800"}': "column 'id' holds half a surrogate pair",
    b'{"text": "x", "meta": {"a": ["\\udfff"]}}': "column 'meta' holds half a surrogate pair",
    b'{"text": "x", "other": "\\ud800"}': None,
    b'{"text": "x", "meta": "\\ud800"}': None,
    b'{"text": "x", "text": " "}': "empty text",
    b'"text"': "not a JSON object",
    b"null": "not a JSON object",
    b"17": "not a JSON object",
}


def test_poison_is_a_problem_row(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(POISON) + b"\n")
    rows = all_rows(path)
    for row, (line, problem) in zip(rows, POISON.items(), strict=True):
        assert (row.problem, row.num_bytes) == (problem, len(line)), line[:50]


def test_integers_beyond_64_bits_are_kept_exactly(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "x", "id": 123456789012345678901234567890, "meta": {"n": [36893488147419103232]}}')
    (record,) = read_records([path])
    assert (record.id, record.meta) == ("123456789012345678901234567890", {"n": [2**65]})
    write_records(tmp_path / "y.jsonl", [record])
    assert list(read_records([tmp_path / "y.jsonl"])) == [record]


def test_values_of_tables_become_json(tmp_path: Path) -> None:
    columns = {
        "text": ["x"],
        "day": [date(2020, 2, 29)],
        "time": [datetime(2020, 2, 29, 12, 30)],
        "took": [timedelta(seconds=90)],
        "price": [Decimal("1.50")],
        "nested": [{"days": [date(2020, 1, 1)], "none": None}],
        "score": [0.5],
    }
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    names = ("day", "time", "took", "price", "nested", "score", "absent")
    (row,) = all_rows(path, Columns(meta=names))
    assert row.record and row.record.meta == {
        "day": "2020-02-29",
        "time": "2020-02-29T12:30:00",
        "took": 90.0,
        "price": "1.50",
        "nested": {"days": ["2020-01-01"], "none": None},
        "score": 0.5,
    }
    assert json.loads(json.dumps(row.record.meta)) == row.record.meta


def test_a_broken_value_in_a_table_costs_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    binary = pyarrow.array([b"good", b"\xff\xfe", b"good too"])
    text = pyarrow.StringArray.from_buffers(3, *binary.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "image": binary}), path)
    rows = all_rows(path)
    assert [row.problem for row in rows] == [None, "not UTF-8", None]
    assert {row.problem for row in all_rows(path, Columns("text", meta=("image",)))} == {
        "not UTF-8",
        "column 'image' holds bytes",
    }


def test_a_foreign_column_called_meta_that_has_no_form_in_json_is_left(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"], "meta": [{"image": b"\xff"}]}), path)
    (row,) = all_rows(path)
    assert row.record and row.record.meta == {}
    (row,) = all_rows(path, Columns(meta=("meta",)))
    assert row.problem == "column 'meta' holds bytes"


def test_columns_are_kept_in_meta_beside_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "x", "url": "u", "n": null, "meta": {"k": 1}}')
    (row,) = all_rows(path, Columns(meta=("url", "n", "absent")))
    assert row.record and row.record.meta == {"k": 1, "url": "u", "n": None}


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["half", "garbage", "flipped"])
def test_a_damaged_file_ends_with_one_row_that_says_so(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"x{suffix}"
    write_records(path, (Record(str(i), content_id(str(i)) * 20) for i in range(6000)))
    data = bytearray(path.read_bytes())
    if damage == "half":
        del data[len(data) // 2 :]
    elif damage == "garbage":
        data = bytearray(b"garbage" * 100)
    else:
        data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    path.write_bytes(data)
    rows = all_rows(path)
    assert [row.number for row in rows if row.problem == DAMAGED] == [len(rows) - 1]
    assert "damaged or truncated" in rows[-1].detail
    if damage == "half":  # flipped bits may first unpack as something else
        assert all(row.record for row in rows[:-1])
    if damage == "garbage":
        assert len(rows) == 1
    if suffix != ".parquet":  # of which the table of contents is at the end
        assert damage == "garbage" or len(rows) > 1000


def test_zeros_after_a_gzip_file_and_skippable_zstandard_frames_are_skipped(tmp_path: Path) -> None:
    line = b'{"text": "x"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line) + b"\0" * 5000)
    frame = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    (tmp_path / "b.jsonl.zst").write_bytes(frame + zstandard.compress(line) + frame + zstandard.compress(line))
    assert [r.text for r in read_records([tmp_path])] == ["x"] * 3


def test_a_missing_text_column_of_a_table_is_the_users_to_mend(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), path)
    with pytest.raises(UserError, match="no column 'text'; its columns are content"):
        all_rows(path)


def test_a_file_that_cannot_be_read_names_itself(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.parquet", "x.arrow"):
        path = tmp_path / name
        path.write_bytes(b"x")
        (source,) = expand_sources([path])
        path.unlink()
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            list(consume(read_blocks(source, TEXT, 10, every)))


def consume(blocks: Iterator[tuple[int, Iterator[Row]]]) -> Iterator[Row]:
    for _, rows in blocks:
        yield from rows
