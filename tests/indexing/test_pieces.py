"""Rows become the same pieces by columns as record by record; whatever is unexpected is read record by record."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tpt.indexing import sentences
from megatron_tpt.indexing.join import Join, pieces
from megatron_tpt.indexing.pieces import PieceMaker
from megatron_tpt.records import Columns, Record
from megatron_tpt.records.record import BadRecord

TEXT = st.text(max_size=20) | st.sampled_from(["", " ", "\n\t", "\u3000\x1c", "a", "\x00", "  b \n", "\ufeff"])
VALUE = TEXT | st.none() | st.integers() | st.booleans() | st.floats() | st.lists(TEXT, max_size=2)
RECORD = st.fixed_dictionaries(
    {"text": st.one_of(TEXT, TEXT, TEXT, VALUE)},
    optional={"thinking": st.one_of(TEXT, st.none(), VALUE), "id": VALUE, "meta": VALUE, "other": VALUE},
)
LINE = st.builds(lambda record, ascii: json.dumps(record, ensure_ascii=ascii), RECORD, st.booleans())
ODD_LINES = [
    b"",
    b"  ",
    b"\r",
    b'{"text": "a"}\r',
    b' {"text": "a"}',
    b'{"text": "a"} ',
    b'{"text": "a"}{"text": "b"}',
    b'{"text": "a"},{"text": "b"}',
    b'{"text": "a"',
    b',"other": {}}',
    b'{"text": "a", "text": "b"}',
    b'{"text": "a", "other": NaN}',
    b'{"text": "a", "other": 1e999}',
    b'{"text": "\\ud800"}',
    b'{"text": "a", "other": "\\ud800"}',
    b'{"text": "a", "other": ' + b"[" * 99 + b"]" * 99 + b"}",
    b'{"text": "a", "other": ' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"text": "a", "meta": ' + b'{"]": ' * 1500 + b"1" + b"}" * 1500 + b"}",
    b'{"text": "a", "other": "' + b"[" * 200 + b'"}',
    b'{"text": "\xff"}',
    b'{"text": "a", "other": "\xff"}',
    b'{"text": "a\x01"}',
    b'{"text": "a", "id": 99999999999999999999999}',
    b'{"text": "a", "id": 7}',
    b'{"text": "a", "id": true}',
    b'{"te\\u0078t": "a"}',
    b"[]",
    b"7",
    b"null",
    b"{}",
    b"\xef\xbb\xbf" + b'{"text": "a"}',
    b'{"text": "a", "thinking": "\\u2003\\n x \\u0085"}',
]
FAST_JOINS = [join for join in Join if join is not Join.interleaved]


def lines_of(items: list[str | bytes]) -> bytes:
    return b"\n".join(item if isinstance(item, bytes) else item.encode("utf-8", "replace") for item in items)


def assert_same(maker: PieceMaker, rows: bytes | pyarrow.RecordBatch) -> None:
    exact = maker.make_slowly(rows)
    portions = [portion for _, portion in maker.make(rows)]
    assert [text for portion in portions for text in portion.texts.to_pylist()] == exact.texts.to_pylist()
    assert [flags for portion in portions for flags in portion.flags.tolist()] == exact.flags.tolist()
    assert sum((portion.skipped for portion in portions), Counter()) == exact.skipped
    assert sum(portion.num_rows for portion in portions) == exact.num_rows


@settings(max_examples=150, deadline=None)
@given(
    st.lists(LINE | st.sampled_from(ODD_LINES), max_size=8), st.sampled_from(FAST_JOINS), st.booleans(), st.booleans()
)
def test_lines_by_columns_are_lines_one_by_one(items: list, join: Join, two_columns: bool, named_ids: bool) -> None:
    columns = Columns("text,thinking" if two_columns else "text", "other" if named_ids else "id")
    assert_same(PieceMaker(columns, join, "skip"), lines_of(items))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT | st.none(), TEXT | st.none()), max_size=8), st.sampled_from(FAST_JOINS))
def test_rows_of_tables_by_columns_are_rows_one_by_one(rows: list, join: Join) -> None:
    batch = pyarrow.RecordBatch.from_pydict({"text": [t for t, _ in rows], "thinking": [t for _, t in rows]})
    batch = batch.cast(pyarrow.schema([("text", pyarrow.string()), ("thinking", pyarrow.large_string())]))
    assert_same(PieceMaker(Columns(), join, "skip"), batch)


@pytest.mark.parametrize("odd", ODD_LINES)
def test_every_unexpected_line_between_plain_ones_is_what_the_exact_parser_says(odd: bytes) -> None:
    plain = b'{"text": "x", "thinking": "y"}'
    maker = PieceMaker(Columns(), Join.document_thinking, "skip")
    for lines in ([odd, plain], [plain, odd, plain], [plain, odd], [odd, odd]):
        assert_same(maker, b"\n".join(lines))
        assert_same(maker, b"\n".join(lines) + b"\n")


def test_plain_lines_go_the_fast_way_and_one_bad_line_slows_down_only_its_neighbours() -> None:
    plain = b'{"text": "some words", "thinking": "a thought", "id": 3}\n' * 5000
    for on_bad_record in ("stop", "skip"):
        maker = PieceMaker(Columns(), Join.document_thinking, on_bad_record)
        assert len(list(maker.make(plain))) == 1
    assert len(list(maker.make(plain + b'{"text": null}\n{"text": " "}\n' + plain))) == 1  # counted by columns
    looked_at = [len(rows) for rows, portion in maker.make(plain + b"bad\n" + plain) if portion.skipped]
    assert len(looked_at) == 1 and looked_at[0] < 1 << 14


def test_a_bad_record_that_stops_is_named_by_its_row() -> None:
    maker = PieceMaker(Columns(), Join.thinking_only, "stop")
    rows = b'{"text": "a", "thinking": "b"}\n\n{"text": "a"}\n'
    (_, portion), *_ = maker.make(rows)
    assert portion.problem is not None
    assert (portion.problem.number, portion.problem.problem) == (2, "no thinking")
    assert maker.row_number(b'\n{"text": "a"}\n\n{"text": "b"}\n', 1) == 3


def test_broken_strings_in_a_table_are_bad_rows() -> None:
    offsets, data = pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])), pyarrow.py_buffer(b"a\xff")
    text = pyarrow.StringArray.from_buffers(2, offsets, data)
    maker = PieceMaker(Columns(), Join.document_thinking, "skip")
    portions = [p for _, p in maker.make(pyarrow.RecordBatch.from_arrays([text], ["text"]))]
    assert sum((p.skipped for p in portions), Counter()) == {"not UTF-8": 1}
    assert [text for p in portions for text in p.texts.to_pylist()] == ["a"]


def chunked(text: str, thinking: str, *chunks: tuple[int, int]) -> Record:
    meta = {"chunks": [{"text_end": text_end, "thinking_end": thinking_end} for text_end, thinking_end in chunks]}
    return Record("1", text, thinking, meta)


def test_chunks_are_interleaved() -> None:
    record = chunked("abcdef", " one two ", (2, 5), (4, 5), (6, 9))
    found = [(text, is_thinking) for text, is_thinking in pieces(record, Join.interleaved)]
    assert found == [("ab", False), ("\none\n", True), ("cd", False), ("ef", False), ("\ntwo\n", True)]
    assert pieces(record, Join.document_thinking) != pieces(record, Join.interleaved)
    tail = chunked("abcd", "x", (2, 1))
    assert [text for text, _ in pieces(tail, Join.interleaved)] == ["ab", "\nx\n", "cd"]


@pytest.mark.parametrize(
    "chunks",
    [
        {"text_end": 1},
        [3],
        [{"text_end": 1}],
        [{"text_end": 1.0, "thinking_end": 1}],
        [{"text_end": True, "thinking_end": 1}],
        [{"text_end": 9, "thinking_end": 1}],
        [{"text_end": 2, "thinking_end": 1}, {"text_end": 1, "thinking_end": 1}],
        [{"text_end": 2, "thinking_end": 0}],
        [{"text_end": -1, "thinking_end": 1}],
    ],
)
def test_malformed_chunks_are_a_bad_record(chunks: object) -> None:
    with pytest.raises(BadRecord, match="bad chunks"):
        list(pieces(Record("1", "abcd", "x", {"chunks": chunks}), Join.interleaved))


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_sentences_are_the_text(text: str) -> None:
    assert "".join(sentences.split(text)) == text


def test_sentences_end_where_sentences_end() -> None:
    assert sentences.split("It is 3.5 km. We go on!  Do we?\n") == ["It is 3.5 km.", " We go on!", "  Do we?\n"]


def test_the_module_needs_no_torch() -> None:
    code = (
        "import sys; import megatron_tpt.indexing.index\n"
        "heavy = {'torch', 'transformers', 'datasets', 'awkward', 'megatron', 'nltk'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
