"""Parts that are no longer what was written are written again, whether the job had finished or not."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from corpus_files import output_bytes, sentence, write_jsonl

from megatron_tpt.corpus.options import PrepareOptions
from megatron_tpt.corpus.prepare import prepare
from megatron_tpt.errors import UserError
from megatron_tpt.records import Record, write_records
from megatron_tpt.records.inventory import Inventory


@pytest.fixture
def options(tmp_path: Path) -> PrepareOptions:
    rows = [{"text": sentence(seed)} for seed in (*range(12), 3, 5)]
    write_jsonl(tmp_path / "raw" / "1.jsonl", [*rows[:6], "{broken"])
    write_jsonl(tmp_path / "raw" / "2.jsonl", rows[6:])
    return PrepareOptions([str(tmp_path / "raw")], tmp_path / "clean", rows_per_shard=4, num_workers=1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("deduplicate", ["exact", "minhash"])
@pytest.mark.parametrize("damage", [empty, truncate, delete])
@pytest.mark.parametrize("name", ["part-00001.jsonl.zst", "rejects/part-00003.jsonl.zst"])
def test_a_damaged_file_is_written_again(
    options: PrepareOptions, name: str, damage: Callable[[Path], None], deduplicate: Any
) -> None:
    options = replace(options, deduplicate=deduplicate)
    report = prepare(options)
    before = output_bytes(options.output)
    damage(options.output / name)
    assert prepare(options) == report
    assert output_bytes(options.output) == before
    assert not list(Inventory(options.output).differences())


def test_a_part_that_was_damaged_before_the_job_ended_is_written_again(options: PrepareOptions) -> None:
    prepare(options)
    before = output_bytes(options.output)
    (options.output / "report.json").unlink()
    (options.output / "part-00002.jsonl.zst").write_bytes(b"")
    prepare(options)
    assert output_bytes(options.output) == before


def test_parts_of_a_job_are_input_only_as_they_were_written(options: PrepareOptions, tmp_path: Path) -> None:
    prepare(options)
    second = PrepareOptions([str(options.output)], tmp_path / "again", num_workers=1)
    path = options.output / "part-00000.jsonl.zst"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"part-00000.jsonl.zst: its content is not what the job that wrote it"):
        prepare(second)
    write_records(path, [Record("x", "another")])
    with pytest.raises(UserError, match=r"part-00000.jsonl.zst: has [\d,]+ bytes"):
        prepare(second)
