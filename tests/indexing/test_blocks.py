"""Blocks for indexing: every record whole or refused by its size, the same for all kinds of files and block sizes."""

import bz2
import gzip
import itertools
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tpt.errors import UserError
from megatron_tpt.indexing import sentences
from megatron_tpt.indexing.blocks import Block, _line_blocks, read_source
from megatron_tpt.indexing.join import Join
from megatron_tpt.indexing.pieces import DOCUMENT_END, PieceMaker, TooLarge
from megatron_tpt.records import Columns, Source, describe, expand_sources, read_between, read_blocks, read_rows
from megatron_tpt.records.limits import VARIABLE

LIMIT = 1 << 20
TEXTS = [
    "a first one",
    "x" * (LIMIT - 100),
    "numbers " * (LIMIT // 8 + 1),
    "y" * (3 * LIMIT),
    "short",
    "z" * (2 * LIMIT),
]
WHOLE = [text for text in TEXTS if len(text) < LIMIT]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
TABLE = pyarrow.table({"text": TEXTS})
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.compress,
    ".jsonl.bz2": bz2.compress,
    ".ndjson.xz": lzma.compress,
    ".json": lambda lines: b"[" + lines.strip().replace(b"\n", b",\n") + b"]",
}
SUFFIXES = [*PACKED, ".parquet", ".arrow", "hub"]


def make_source(folder: Path, suffix: str) -> Source:
    path = folder / f"x{suffix}"
    if suffix in PACKED:
        path.write_bytes(PACKED[suffix](LINES))
    elif suffix == ".arrow":
        dictionary = TABLE.set_column(0, "text", TABLE.column(0).dictionary_encode())
        with pyarrow.ipc.new_file(path, dictionary.schema) as writer:
            writer.write_table(dictionary)
    else:
        (folder / "data").mkdir()
        path = path if suffix == ".parquet" else folder / "data" / "train.parquet"
        pyarrow.parquet.write_table(TABLE, path)
    (source,) = expand_sources([f"hf://{folder}" if suffix == "hub" else path])
    return source


def documents(source: Source, maker: PieceMaker, block_bytes: int) -> tuple[list[str], Counter[str], int]:
    """The texts of documents, the bad records and the number of rows."""
    texts, skipped, num_rows = [""], Counter[str](), 0
    for block in read_source(source, maker.columns, block_bytes):
        for _, pieces in maker.make(block.rows) if isinstance(block, Block) else ():
            for text, flags in zip(pieces.texts.to_pylist(), pieces.flags, strict=True):
                texts[-1] += text
                texts += [""] * bool(flags & DOCUMENT_END)
            skipped += pieces.skipped
            num_rows += pieces.num_rows
    return texts[:-1], skipped, num_rows


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1MiB")


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_record_is_whole_or_refused_in_every_reader(tmp_path: Path, suffix: str) -> None:
    source = make_source(tmp_path, suffix)
    bad = Counter({"record too large": 3})
    for block_bytes, splits in itertools.product([1000, 4 << 20], [False, True]):
        maker = PieceMaker(Columns(), Join.document_only, "skip", sentences.split if splits else None)
        assert documents(source, maker, block_bytes) == (WHOLE, bad, len(TEXTS))
    rows = [row for _, rows in read_blocks(source, Columns(), 100, lambda _: True) for row in rows]
    assert [row.record.text if row.record else row.problem for row in rows] == [
        text if text in WHOLE else "record too large" for text in TEXTS
    ]
    raw = list(read_rows(source))
    assert [(row.problem, row.detail) for row in raw] == [(row.problem, row.detail) for row in rows]
    if suffix == ".jsonl":
        assert list(read_between(source, Columns(), 0, len(LINES))) == rows


@pytest.mark.usefixtures("limit")
def test_the_message_says_where_how_large_and_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path, ".jsonl")
    bad = next(row for row in read_rows(source) if row.problem)
    size = len(TEXTS[2]) + len('{"text": ""}')
    assert describe(source, bad, "hint") == (
        f"{source.name}:3: record too large ({size:,} bytes, the limit is {LIMIT:,}: set the environment variable "
        f"{VARIABLE}=2MiB, or split the document); hint"
    )
    monkeypatch.setenv(VARIABLE, "2MiB")
    assert [row.problem is None for row in read_rows(source)] == [True, True, True, False, True, False]
    for setting, words in (("2GiB", "at most 1GiB"), ("much", "give a size")):
        monkeypatch.setenv(VARIABLE, setting)
        with pytest.raises(UserError, match=words):
            list(read_rows(source))


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(st.integers(0, 40), max_size=12),
    ends_with_newline=st.booleans(),
    chunk_bytes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    block_bytes=st.integers(1, 60),
)
def test_lines_come_whole_or_as_their_size_however_they_are_read(
    lines: list[int], ends_with_newline: bool, chunk_bytes: list[int], block_bytes: int
) -> None:
    content = b"\n".join(b"%c" % (97 + i) * size for i, size in enumerate(lines)) + b"\n" * ends_with_newline
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "20")
        found: list[bytes | int] = []
        for block in _line_blocks(chunks(content, chunk_bytes), block_bytes):
            if isinstance(block.rows, TooLarge):
                found.append(block.rows.num_bytes)
            else:
                assert isinstance(block.rows, bytes)
                found += block.rows.removesuffix(b"\n").split(b"\n")
    expected = content.removesuffix(b"\n").split(b"\n") if content else []
    # What is too large may come as it is, where it arrived with its end; then the parser measures it.
    assert [line if isinstance(line, int) else len(line) for line in found] == list(map(len, expected))
    assert [line for line in found if isinstance(line, bytes)] == [
        line for line, size in zip(expected, found, strict=True) if isinstance(size, bytes)
    ]
    assert all(line > 20 for line in found if isinstance(line, int))


def chunks(content: bytes, sizes: list[int]) -> Iterator[bytes]:
    place = 0
    for size in itertools.cycle(sizes):
        if place >= len(content):
            return
        yield content[place : place + size]
        place += size


@pytest.mark.parametrize("line", [b'{"text": 1, "x": "%s"}', b'{"text": "%s"', b'"%s"'])
def test_a_single_bad_line_of_any_size_is_a_bad_record(line: bytes) -> None:
    maker = PieceMaker(Columns(), Join.document_only, "skip")
    content = line.replace(b"%s", b"x" * 100_000)
    for rows in (content, content + b"\n", content + b'\n{"text": "good"}\n'):
        results = [pieces for _, pieces in maker.make(rows)]
        assert sum((pieces.skipped for pieces in results), Counter[str]()).total() == 1
        assert sum(len(pieces.texts) for pieces in results) == (b"good" in rows)
