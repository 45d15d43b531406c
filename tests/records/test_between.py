"""Stretches of files: side by side they have every row once, wherever they are cut."""

import itertools
import json
import random
from pathlib import Path

import pytest

from megatron_tpt.records import Columns, Record, expand_sources, read_between, read_blocks, write_records


def lines_of_many_kinds() -> bytes:
    chance = random.Random(0)
    texts = ["x" * chance.choice([1, 10, 100, 3000]) for _ in range(200)]
    lines = [json.dumps({"text": f"{i} {text}"}).encode() for i, text in enumerate(texts)]
    lines[3:3] = [b"", b"   ", b"no JSON"]
    return b"\xef\xbb\xbf" + b"\n".join(lines[:100]) + b"\r\n" + b"\r\n".join(lines[100:])  # no newline at the end


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_stretches_side_by_side_have_each_row_once(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_bytes(lines_of_many_kinds())
    else:
        write_records(path, (Record(str(i), f"row {i}") for i in range(1500)))
    [source] = expand_sources([path])
    whole = [row.record for _, rows in read_blocks(source, Columns(), 10_000, lambda _: True) for row in rows]
    size = path.stat().st_size
    chance = random.Random(1)
    for num_cuts in (0, 1, 3, 40, 300):
        cuts = sorted({0, size, *(chance.randrange(size) for _ in range(num_cuts))})
        stretches = itertools.pairwise(cuts)
        rows = [row.record for begin, end in stretches for row in read_between(source, Columns(), begin, end)]
        assert rows == whole


def test_a_line_that_begins_with_the_stretch_belongs_to_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    [source] = expand_sources([path])

    def texts(begin: int, end: int) -> list[str]:
        return [row.record.text for row in read_between(source, Columns(), begin, end) if row.record]

    assert (texts(14, 15), texts(13, 14), texts(15, 28), texts(15, 29)) == (["b"], [], [], ["c"])


def test_a_damaged_file_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 no more than that")
    [source] = expand_sources([path])
    [row] = read_between(source, Columns(), 0, source.num_bytes or 0)
    assert row.problem == "damaged file"
