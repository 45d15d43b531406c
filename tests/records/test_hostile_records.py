"""Records as an attacker writes them: each becomes a record or a bad record in every reader, never a traceback."""

import json
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies

from megatron_tpt.errors import UserError
from megatron_tpt.json_data import MAX_NESTING
from megatron_tpt.records import Columns, ReadCounts, read_records, write_records
from megatron_tpt.records.parsing import parse_line, parse_object, parse_row
from megatron_tpt.records.record import BadRecord


def lists(levels: int) -> str:
    return "[" * levels + "]" * levels


def objects(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def mixed(levels: int) -> str:
    return '[0, {"[": ' * (levels // 2) + '"]}"' + "}]" * (levels // 2)


def line(field: str, value: str) -> str:
    return f'{{"id": "p", "text": "poison", "{field}": {value}}}'


@pytest.mark.parametrize("nested", [lists, objects, mixed])
@pytest.mark.parametrize("field", ["meta", "other"])
@pytest.mark.parametrize("levels", [MAX_NESTING, 240, 990, 1010, 1030, 20_000])
def test_deep_nesting_is_a_bad_record_in_any_field_and_of_any_depth(nested: Any, field: str, levels: int) -> None:
    raw = line(field, nested(levels)).encode()
    for parse in (lambda: parse_line(raw, Columns(meta=("other",))), lambda: parse_object(raw)):
        with pytest.raises(BadRecord, match=f"nested too deeply .more than {MAX_NESTING} levels"):
            parse()


@pytest.mark.parametrize("nested", [lists, objects, mixed])
def test_nesting_up_to_the_bound_is_read_and_written(tmp_path: Path, nested: Any) -> None:
    raw = line("meta", '{"x": ' + nested(MAX_NESTING - 2) + "}").encode()
    record = parse_line(raw, Columns())
    assert record is not None and record.meta == json.loads(raw)["meta"]
    for name in ("out.jsonl", "out.parquet"):
        write_records(tmp_path / name, [record])
        assert [*read_records([tmp_path / name])] == [record]


def test_brackets_in_texts_are_no_nesting() -> None:
    raw = json.dumps({"text": "[{" * 5000, "meta": {"x": [{"y": "[" * 500}] * 500}}).encode()
    record = parse_line(raw, Columns())
    assert record is not None and record.text == "[{" * 5000


def test_a_bad_record_is_named_by_its_line_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        "\n".join(['{"text": "good"}', line("meta", lists(960)), line("meta", objects(5000)), '{"text": "fine"}'])
    )
    with pytest.raises(UserError, match=r"x\.jsonl:2: nested too deeply"):
        list(read_records([path]))
    counts = ReadCounts()
    assert [record.text for record in read_records([path], on_bad_record="skip", counts=counts)] == ["good", "fine"]
    assert counts.skipped == {"nested too deeply": 2}


def test_deep_meta_in_a_table_is_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    meta = [f'{{"x": {lists(50)}}}', f'{{"x": {lists(500)}}}', "no JSON"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "meta": meta}), path)
    counts = ReadCounts()
    assert [record.text for record in read_records([path], on_bad_record="skip", counts=counts)] == ["a", "c"]
    assert counts.skipped == {"nested too deeply": 1}


@pytest.mark.parametrize("field", ["id", "meta", "other"])
def test_an_integer_of_thousands_of_digits_is_a_bad_record(field: str) -> None:
    with pytest.raises(BadRecord, match=r"integer too large .over 4,300 digits"):
        parse_line(f'{{"text": "x", "{field}": {{"n": {"9" * 5000}}}}}'.encode(), Columns())


def test_numbers_beyond_every_type_are_read_and_written(tmp_path: Path) -> None:
    record = parse_line(b'{"text": "x", "meta": {"n": 1e999, "m": -1e400, "k": %s}}' % (b"9" * 4000), Columns())
    assert record is not None and record.meta["k"] == 10**4000 - 1
    write_records(tmp_path / "x.jsonl", [record])
    assert next(iter(read_records([tmp_path / "x.jsonl"]))).text == "x"


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = strategies.dictionaries(strategies.sampled_from(["id", "text", "thinking", "meta", "a"]), JSON)


def parse_or_bad(parse: Any) -> None:
    try:
        parse()
    except BadRecord as bad:
        assert str(bad) and "\n" not in bad.problem


@hypothesis.settings(max_examples=300, deadline=None, database=None)
@hypothesis.given(
    FIELDS, strategies.lists(strategies.tuples(strategies.integers(0, 400), strategies.binary(max_size=4)), max_size=3)
)
def test_any_bytes_are_a_record_or_a_bad_record(fields: dict[str, Any], changes: list[tuple[int, bytes]]) -> None:
    raw = json.dumps(fields).encode()
    for place, new in changes:
        raw = raw[: place % (len(raw) + 1)] + new + raw[place % (len(raw) + 1) + 1 :]
    for columns in (Columns(), Columns("text,a", "a", ("meta", "a")), Columns("a.b")):
        parse_or_bad(lambda columns=columns: parse_line(raw, columns))
    parse_or_bad(lambda: parse_object(raw))


@hypothesis.settings(max_examples=150, deadline=None, database=None)
@hypothesis.given(FIELDS)
def test_any_row_of_a_table_is_a_record_or_a_bad_record(fields: dict[str, Any]) -> None:
    for columns in (Columns(), Columns("text,a", "a", ("meta", "a")), Columns("a.b")):
        parse_or_bad(lambda columns=columns: parse_row(fields, columns))
