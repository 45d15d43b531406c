"""Files that unpack, or decode, to far more than they are: memory stays within that of a batch."""

import bz2
import gzip
import lzma
import resource
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from megatron_tpt.records import ReadCounts, expand_sources, read_records, read_rows
from megatron_tpt.records.table_sizes import bounded, decoded_bytes

MIB = 1 << 20
MARGIN_KB = 300 << 10


def peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


PACKERS = {
    ".gz": lambda data: gzip.compress(data, 1),
    ".bz2": lambda data: bz2.compress(data, 9),
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": lambda data: zstandard.ZstdCompressor(1).compress(data),
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_line_that_unpacks_without_end_is_a_bad_record(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_TPT_MAX_RECORD_SIZE", "1MiB")
    path = tmp_path / f"x.jsonl{suffix}"
    frame = PACKERS[suffix](bytes(64 * MIB))  # frames that follow each other are one file
    path.write_bytes(PACKERS[suffix](b'{"text": "a"}\n') + 6 * frame + PACKERS[suffix](b'\n{"text": "b"}\n'))
    before_kb, counts = peak_kb(), ReadCounts()
    assert [record.text for record in read_records([path], on_bad_record="skip", counts=counts)] == ["a", "b"]
    assert counts.skipped == {"record too large": 1}
    assert peak_kb() - before_kb < MARGIN_KB


def repeated(num_rows: int, value: str) -> pyarrow.DictionaryArray:
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * num_rows, pyarrow.int32()), pyarrow.array([value]))


def written(path: Path, table: pyarrow.Table, *, keeps_types: bool) -> Path:
    if path.suffix == ".arrow":
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=keeps_types)
    return path


@pytest.mark.parametrize(("name", "keeps_types"), [("x.parquet", True), ("x.parquet", False), ("x.arrow", True)])
def test_a_dictionary_with_a_long_value_is_decoded_in_parts(tmp_path: Path, name: str, keeps_types: bool) -> None:
    path = written(tmp_path / name, pyarrow.table({"text": repeated(1000, "x" * MIB)}), keeps_types=keeps_types)
    assert path.stat().st_size < 3 * MIB
    before_kb = peak_kb()
    assert sum(len(record.text) == MIB for record in read_records([path])) == 1000
    assert peak_kb() - before_kb < MARGIN_KB


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_a_row_that_decodes_to_more_than_a_record_is_a_bad_one(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_TPT_MAX_RECORD_SIZE", "8MiB")
    offsets = pyarrow.array([0, 1, 900, 902], pyarrow.int32())
    turns = pyarrow.ListArray.from_arrays(offsets, repeated(902, "x" * MIB))
    table = pyarrow.table({"text": ["a", "b", "c"], "turns": turns})
    (source,) = expand_sources([written(tmp_path / name, table, keeps_types=False)])
    before_kb = peak_kb()
    rows = list(read_rows(source))
    assert [row.problem for row in rows] == [None, "record too large", None]
    assert [len(row.value["turns"]) for row in rows if row.value] == [1, 2]
    assert peak_kb() - before_kb < MARGIN_KB


@pytest.mark.parametrize(
    "column",
    [
        repeated(10, "abc"),
        pyarrow.StructArray.from_arrays([repeated(10, "abc"), pyarrow.array(range(10))], ["a", "b"]),
        pyarrow.ListArray.from_arrays(pyarrow.array(range(11), pyarrow.int32()), repeated(10, "abc")),
        pyarrow.array([1, None] * 5).dictionary_encode(),
        pyarrow.array(["a", None] * 5).dictionary_encode(),
        pyarrow.array(["a", "bc"] * 5),
    ],
)
def test_slices_have_all_rows_in_order_whatever_their_types(column: Any) -> None:
    batch = pyarrow.RecordBatch.from_arrays([column], ["x"])
    parts = list(bounded(batch, 20))
    assert [row for part in parts for row in part.to_pylist()] == batch.to_pylist()
    assert all(decoded_bytes(part) <= 20 or part.num_rows == 1 for part in parts) or len(parts) == 1
