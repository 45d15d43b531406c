"""`--where` of index and pack_sft: the same documents as a file that holds only those, and all others counted."""

import datetime
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pytest
from indexing_inputs import generated_text

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.join import Join
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.merge import merge
from megatron_tpt.indexing.merge_options import MergeOptions
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.pieces import PieceMaker
from megatron_tpt.indexing.selection import NOT_SELECTED, Selection
from megatron_tpt.records import Columns, Record, write_records
from megatron_tpt.records.where import Where

WHERE = "'long' in strata and tokens > 20"


def make_records(num: int = 400) -> list[Record]:
    draw = random.Random(3)
    return [
        Record(
            f"r{i}", generated_text(i, draw.randint(1, 60)), generated_text(-i, 9) if i % 3 == 0 else None,
            {"tokens": draw.randint(1, 60), "strata": draw.choice([["long"], ["short", "long"], ["short"], []])},
        )
        for i in range(num)
    ]  # fmt: skip


def is_selected(record: Record) -> bool:
    return "long" in record.meta["strata"] and record.meta["tokens"] > 20


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx")]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("join", [Join.document_thinking, Join.interleaved])  # by columns, record by record
def test_an_index_of_selected_records_is_that_of_a_file_of_them(
    suffix: str, join: Join, tmp_path: Path, tokenizer_dir: Path
) -> None:
    records = make_records()
    write_records(tmp_path / f"all.{suffix}", records)
    write_records(tmp_path / "some.jsonl", filter(is_selected, records))
    common: dict[str, Any] = {"tokenizer": tokenizer_dir, "join": join}
    manifest = index(IndexOptions(input=[tmp_path / f"all.{suffix}"], output=tmp_path / "all", where=WHERE, **common))
    expected = index(IndexOptions(input=[tmp_path / "some.jsonl"], output=tmp_path / "some", **common))
    assert content(tmp_path / "all") == content(tmp_path / "some")
    assert manifest.counts.documents == expected.counts.documents == sum(map(is_selected, records))
    assert manifest.counts.skipped == {NOT_SELECTED: len(records) - manifest.counts.documents}
    assert Manifest.read(tmp_path / "all").where == WHERE and expected.where is None


def test_another_condition_is_refused_and_mistakes_are_named(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(tmp_path / "all.jsonl", make_records(50))
    common: dict[str, Any] = {"input": [tmp_path / "all.jsonl"], "tokenizer": tokenizer_dir}
    index(IndexOptions(output=tmp_path / "all", where=WHERE, **common))
    with pytest.raises(UserError, match=r"--where was .*, now tokens > 1"):
        index(IndexOptions(output=tmp_path / "all", where="tokens > 1", **common))
    with pytest.raises(UserError, match=r"--where was .*, now None"):
        index(IndexOptions(output=tmp_path / "all", **common))
    with pytest.raises(UserError, match="cannot be part of a condition"):
        index(IndexOptions(output=tmp_path / "bad", where="len(strata) > 1", **common))
    with pytest.raises(UserError, match=r"holds no document to index \(not selected by --where: 50\)"):
        index(IndexOptions(output=tmp_path / "none", where="tokens > 100", **common))
    index(IndexOptions(output=tmp_path / "typo", where="not tokns > 1", **common))
    assert "no record has tokns in its meta" in capsys.readouterr().err


def test_merged_strata_say_what_either_selected(tmp_path: Path, tokenizer_dir: Path) -> None:
    write_records(tmp_path / "all.jsonl", make_records(50))
    for name, where in (("a", "'long' in strata"), ("b", "'short' in strata"), ("c", None)):
        index(IndexOptions([tmp_path / "all.jsonl"], tokenizer_dir, tmp_path / name, where=where))
    merge(MergeOptions(input=[tmp_path / "a", tmp_path / "b"], output=tmp_path / "ab"))
    merge(MergeOptions(input=[tmp_path / "ab", tmp_path / "c"], output=tmp_path / "abc"))
    assert Manifest.read(tmp_path / "ab").where == "('long' in strata) or ('short' in strata)"
    assert Manifest.read(tmp_path / "abc").where is None


def test_by_columns_the_same_rows_are_selected_as_one_by_one() -> None:
    lines = [json.dumps({"id": r.id, "text": r.text, "meta": r.meta}) for r in make_records(60)]
    lines[5:5] = [
        '{"text": "a"}',
        '{"text": "a", "meta": 7}',
        '{"text": "b", "meta": {"tokens": 30, "strata": ["long"]}}',
    ]
    maker = PieceMaker(Columns(), Join.document_thinking, "skip", selection=Selection(Where(WHERE)))
    for items in (lines, [*lines, "", '{"text": "", "meta": {"tokens": 30, "strata": ["long"]}}', "{broken", "[]"]):
        rows = "".join(f"{line}\n" for line in items).encode()
        slow = maker.make_slowly(rows)
        found = [pieces for _, pieces in maker.make(rows)]
        assert [text for pieces in found for text in pieces.texts.to_pylist()] == slow.texts.to_pylist()
        assert sum(pieces.num_rows for pieces in found) == slow.num_rows == len(items)
        assert sum((pieces.skipped for pieces in found), Counter[str]()) == slow.skipped
        last = len(slow.texts) - 1
        assert json.loads(items[maker.row_number(rows, last)])["text"] == slow.texts[last].as_py()
    assert maker._fast("".join(f"{line}\n" for line in lines).encode()) is not None


@pytest.mark.parametrize("where", [WHERE, "not tokens > 20", "day == '2024-05-01'"])
@pytest.mark.parametrize("kind", ["none", "struct", "json", "foreign", "too deep"])
def test_of_tables_the_same_rows_are_selected_as_one_by_one(where: str, kind: str) -> None:
    metas: dict[str, list[Any]] = {
        "struct": [{"tokens": 30, "strata": ["long"]}, None, {"day": datetime.date(2024, 5, 1)}],
        "json": ['{"tokens": 30, "strata": ["long"]}', None, "no object"],
        "foreign": [b"\xff", None, b"a"],
        "too deep": ['{"a":' * 300 + "1" + "}" * 300, None, '{"tokens": 30, "strata": ["long"]}'],
    }
    columns: dict[str, list[Any]] = {"text": ["a", "b", "c"]} | ({"meta": metas[kind]} if kind != "none" else {})
    table = pyarrow.RecordBatch.from_pydict(columns)
    maker = PieceMaker(Columns(), Join.document_thinking, "skip", selection=Selection(Where(where)))
    slow = maker.make_slowly(table)
    found = [pieces for _, pieces in maker.make(table)]
    assert [text for pieces in found for text in pieces.texts.to_pylist()] == slow.texts.to_pylist()
    assert sum((pieces.skipped for pieces in found), Counter[str]()) == slow.skipped
    if where.startswith("not") and kind == "none":
        assert len(slow.texts) == 3


def test_questions_behind_the_first_answer_are_not_learned_as_if_they_were_answers(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    chat = [("user", "Hi"), ("assistant", "Ho"), ("user", "More"), ("assistant", "No")]
    for name, messages in (("short", chat[:2]), ("long", chat)):
        meta = {"answer_begin": 3, "messages": [{"from": who, "value": text} for who, text in messages]}
        write_records(tmp_path / f"{name}.jsonl", [Record("a", "\n".join(text for _, text in messages), None, meta)])
    common: dict[str, Any] = {
        "tokenizer": tokenizer_dir, "sequence_length": 64, "prompt_column": "question", "response_column": "answer"
    }  # fmt: skip
    pack_sft(PackOptions(input=[tmp_path / "short.jsonl"], output=tmp_path / "short", **common))
    with pytest.raises(UserError, match=r"long\.jsonl:1: several turns \(behind the first answer are messages"):
        pack_sft(PackOptions(input=[tmp_path / "long.jsonl"], output=tmp_path / "long", **common))


def test_packed_indices_are_not_merged_as_if_all_were_learned(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "a", "a": "b"}\n')
    for name in ("a", "b"):
        pack_sft(
            PackOptions(
                input=[tmp_path / "a.jsonl"], output=tmp_path / name, tokenizer=tokenizer_dir, sequence_length=16,
                prompt_column="q", response_column="a",
            )
        )  # fmt: skip
    with pytest.raises(UserError, match=r"a\.json: no such index"):
        merge(MergeOptions(input=[tmp_path / "a", tmp_path / "b"], output=tmp_path / "ab"))


def test_packed_are_the_selected_conversations_questions_and_answers(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def pair(i: int) -> Record:
        question, answer = f"What is {i}?", f"It is {i}."
        return Record(
            f"p{i}", f"{question}\n{answer}", None, {"answer_begin": len(question) + 1, "strata": ["s"] * (i % 2)}
        )

    write_records(tmp_path / "all.jsonl", map(pair, range(40)))
    plain = tmp_path / "plain.jsonl"
    rows = [{"question": f"What is {i}?\n", "answer": f"It is {i}."} for i in range(1, 40, 2)]
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {
        "tokenizer": tokenizer_dir, "sequence_length": 64, "prompt_column": "question", "response_column": "answer"
    }  # fmt: skip
    manifest = pack_sft(
        PackOptions(input=[tmp_path / "all.jsonl"], output=tmp_path / "all", where="'s' in strata", **common)
    )
    pack_sft(PackOptions(input=[plain], output=tmp_path / "plain", **common))
    assert content(tmp_path / "all") == content(tmp_path / "plain")
    assert PackedIndex(tmp_path / "all").first_difference_of_masks(PackedIndex(tmp_path / "plain")) is None
    assert (manifest.counts.examples, manifest.counts.skipped) == (20, {NOT_SELECTED: 20})
    with pytest.raises(UserError, match=r"--where: 's' in strata -> none"):
        pack_sft(PackOptions(input=[tmp_path / "all.jsonl"], output=tmp_path / "all", **common))
    packed = PackedIndex(tmp_path / "all")
    assert "'meta'" not in capsys.readouterr().err  # it was read
    assert numpy.array_equal(packed.learned(0)[1:], numpy.concatenate([e.has_loss for e in packed[0]])[1:])
