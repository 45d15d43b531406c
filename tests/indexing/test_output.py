"""Jobs resume where they were killed; shards, sentences and interleaved thinking are Megatron's to the byte."""

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from indexing_inputs import generated_text

from megatron_tpt.errors import UserError
from megatron_tpt.indexing import blocks, sentences, writer
from megatron_tpt.indexing import index as indexing
from megatron_tpt.indexing.index import index, index_shards
from megatron_tpt.indexing.join import Join
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.marks import mark_thinking
from megatron_tpt.indexing.merge import merge
from megatron_tpt.indexing.merge_options import MergeOptions
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.source_manifests import read_manifests
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.indexing.verification import verify
from megatron_tpt.records import Columns, expand_sources

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

TOOL = Path(__file__).parents[2] / "tools" / "index.py"


def write_files(folder: Path, num_files: int, documents_per_file: int, num_words: int = 30) -> list[Path]:
    """Files of all kinds, every document another."""
    folder.mkdir()
    paths = []
    for number in range(num_files):
        rng = random.Random(number)
        texts = [generated_text(rng.randrange(1 << 30), num_words) for _ in range(documents_per_file)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        path = folder / f"{number:03d}{['.jsonl', '.jsonl.gz', '.parquet'][number % 3]}"
        if number % 3 == 2:
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
        else:
            path.write_bytes(gzip.compress(lines.encode()) if number % 3 else lines.encode())
        paths.append(path)
    return paths


class Stop(Exception):
    """Ends a job in the middle."""


def stop_after(monkeypatch: pytest.MonkeyPatch, num_sources: int) -> list[str]:
    """Let jobs read that many more sources and fail in the next; returns the names of those that were opened."""
    opened: list[str] = []
    read_source = blocks.read_source

    def read(source, columns, block_bytes):
        opened.append(source.path.name)
        for block in read_source(source, columns, block_bytes):
            if len(opened) > num_sources:
                raise Stop
            yield block

    monkeypatch.setattr(indexing, "read_source", read)
    return opened


@pytest.mark.parametrize("shard_size", [None, "6KB"])
def test_a_job_goes_on_behind_the_last_finished_file(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str | None
) -> None:
    write_files(tmp_path / "in", 7, 30)
    options = IndexOptions([tmp_path / "in"], tokenizer_dir, tmp_path / "a" / "x", shard_size=shard_size)
    unbroken = index_shards(replace(options, output=tmp_path / "b" / "x"))
    assert (len(unbroken) > 3) == (shard_size is not None)
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_after(patch, 3)
            index_shards(options)
        # What a kill leaves behind the last finished file is taken away.
        with max((tmp_path / "a" / ".tmp-x").glob("*.bin")).open("ab") as file:
            file.write(b"half a document")
        with (tmp_path / "a" / ".tmp-x" / "journal").open("ab") as file:
            file.write(b'{"source": {"path"')
    opened = stop_after(monkeypatch, 100)
    resumed = index_shards(options)
    assert opened == ["006.jsonl"]
    assert [manifest.checksums for manifest in resumed] == [manifest.checksums for manifest in unbroken]
    assert [manifest.counts for manifest in resumed] == [manifest.counts for manifest in unbroken]
    assert [manifest.sources for manifest in resumed] == [manifest.sources for manifest in unbroken]
    assert not (tmp_path / "a" / ".tmp-x").exists()
    assert index_shards(options) == resumed and opened == ["006.jsonl"]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_unfinished_work_of_other_settings_or_inputs_is_named_and_kept(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_files(tmp_path / "in", 3, 20)
    options = IndexOptions([tmp_path / "in"], tokenizer_dir, tmp_path / "x")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 2)
        index(options)
    kept = files_in(tmp_path / ".tmp-x")
    content = paths[0].read_bytes()
    for changed, difference in [
        (replace(options, append_eos=False), r"choice of --append-eos was True, now False"),
        (replace(options, join=Join.document_only), r"join was document_thinking, now document_only"),
        (replace(options, input=paths[1:]), r"input: 1 added \(.*002.parquet\), 1 removed \(.*000.jsonl\)"),
        (replace(options, shard_size="5KB"), r"--shard-size in bytes was None, now 5000"),
        (options, r"input: 1 changed \(.*000.jsonl\)"),
    ]:
        if changed is options:
            paths[0].write_text('{"text": "another"}\n')
        with pytest.raises(UserError, match=f"2 input files with other .*{difference}.* or remove .*/.tmp-x$"):
            index_shards(changed)
        assert files_in(tmp_path / ".tmp-x") == kept
    paths[0].write_bytes(content)
    opened = stop_after(monkeypatch, 100)
    assert index(options).counts.documents == 60
    assert opened == ["002.parquet"]


def test_files_added_behind_those_that_are_done_are_indexed_and_others_are_named(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path / "in", 3, 20)
    options = IndexOptions([tmp_path / "in"], tokenizer_dir, tmp_path / "x")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 2)
        index(options)
    between = tmp_path / "in" / "0005.jsonl"
    between.write_text('{"text": "new"}\n')
    with pytest.raises(UserError, match=r"2 input files with other .* \(input: 1 added \(\S*/0005\.jsonl\)\)"):
        index(options)
    between.rename(tmp_path / "in" / "1.jsonl")
    assert index(options).counts.documents == 61
    (tmp_path / "in" / "2.jsonl").write_text('{"text": "newer"}\n')
    with pytest.raises(UserError, match=r"input: 1 added \(\S*/2\.jsonl\)\); index the new files alone .*merge_index"):
        index(options)
    added = index(replace(options, input=[tmp_path / "in" / "2.jsonl"], output=tmp_path / "y"))
    merged = merge(MergeOptions(tmp_path / "z", [str(tmp_path / "x"), str(tmp_path / "y")]))
    assert added.counts.documents == 1 and merged is not None and merged.counts.documents == 62


def test_an_index_inside_its_input_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "in", 1, 5)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for output in (tmp_path / "in" / "x", tmp_path / "link" / "deep" / "x"):
        with pytest.raises(UserError, match="is inside the input"):
            index(IndexOptions([tmp_path / "in"], tokenizer_dir, output))
    assert len(list((tmp_path / "in").iterdir())) == 1


def test_other_settings_while_a_complete_index_is_moved_into_place_are_refused(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_files(tmp_path / "in", 2, 20)
    options = IndexOptions([tmp_path / "in"], tokenizer_dir, tmp_path / "x")

    def die(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(indexing, "publish", die)
        index(options)
    for changed in (replace(options, join=Join.document_only), replace(options, input=paths[:1])):
        with pytest.raises(
            UserError, match=r"2 input files with other settings or input \((join was|input: 1 removed)"
        ):
            index(changed)
    assert index(options) == verify(tmp_path / "x")


def test_more_inputs_and_the_way_with_bad_records_may_change_on_the_way(tokenizer_dir: Path, tmp_path: Path) -> None:
    """What a message advises, and what turns up late, must not cost the work that is done."""
    first, second, third = write_files(tmp_path / "in", 3, 20)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\nbad\n')
    options = IndexOptions([first, second, bad], tokenizer_dir, tmp_path / "x")
    with pytest.raises(UserError, match=r"bad.jsonl:2: not JSON.*--on-bad-record skip"):
        index(options)
    with pytest.MonkeyPatch.context() as patch:
        opened = stop_after(patch, 100)
        continued = replace(options, input=[first, second, bad, third], on_bad_record="skip")
        manifest = index(continued)
    assert opened == ["bad.jsonl", "002.parquet"]
    assert manifest.counts.skipped == {"not JSON": 1}
    assert index(replace(continued, output=tmp_path / "unbroken")).checksums == manifest.checksums


def test_a_bad_record_leaves_the_finished_files_to_go_on_from(tokenizer_dir: Path, tmp_path: Path) -> None:
    first, second, *_ = write_files(tmp_path / "in", 2, 20)
    (tmp_path / "last.jsonl").write_text('{"text": "a"}\nbad\n')
    options = IndexOptions([first, second, tmp_path / "last.jsonl"], tokenizer_dir, tmp_path / "x")
    with pytest.raises(UserError, match=r"last.jsonl:2: not JSON"):
        index(options)
    assert not list(tmp_path.glob("x.*"))
    (tmp_path / "last.jsonl").write_text('{"text": "a"}\n')
    assert index(options).counts.documents == 41


def test_killed_at_random_moments_the_same_command_gives_the_same_index(tokenizer_dir: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "in", 12, 1500, 60)
    arguments = [sys.executable, TOOL, "--input", tmp_path / "in", "--tokenizer", tokenizer_dir]
    arguments = [*map(str, arguments), "--num-workers", "1", "--output"]
    rng = random.Random(0)
    journal = tmp_path / "a" / ".tmp-x" / "journal"
    num_kills = 0
    for _ in range(3):
        size = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen([*arguments, str(tmp_path / "a" / "x")], stderr=subprocess.DEVNULL)
        while process.poll() is None and (not journal.exists() or journal.stat().st_size <= size):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        num_kills += process.wait() == -signal.SIGKILL
    assert num_kills >= 2
    subprocess.run([*arguments, str(tmp_path / "a" / "x")], check=True, stderr=subprocess.DEVNULL)
    unbroken = index(IndexOptions([tmp_path / "in"], tokenizer_dir, tmp_path / "b" / "x"))
    assert verify(tmp_path / "a" / "x").checksums == unbroken.checksums


def test_a_damaged_file_is_named_whatever_is_done_with_bad_records(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_files(tmp_path / "in", 2, 200)[1]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"001.jsonl.gz: damaged or truncated"):
        index(IndexOptions([path], tokenizer_dir, tmp_path / "x", on_bad_record="skip"))


def test_small_blocks_many_workers_and_kinds_of_files_change_nothing(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path / "in", 3, 300)
    options = IndexOptions([tmp_path / "in"], tokenizer_dir, tmp_path / "x")
    expected = index(options).checksums
    monkeypatch.setattr(indexing, "_MAX_BLOCK_BYTES", 1000)
    monkeypatch.setattr(indexing, "_MIN_BLOCK_BYTES", 1000)
    monkeypatch.setattr(blocks, "_READ_BYTES", 777)
    for backend in ("gigatoken", "reference"):
        output = tmp_path / backend
        assert index(replace(options, output=output, num_workers=7, tokenizer_backend=backend)).checksums == expected


def test_blocks_of_tables_keep_to_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_READ_BYTES", 777)
    texts = ["x" * (5000 if number % 50 == 0 else number) for number in range(1000)]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pyarrow.ipc.new_file(tmp_path / "d.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("d.parquet", "d.arrow"):
        (source,) = expand_sources([tmp_path / name])
        *parts, end = blocks.read_source(source, Columns(), 3000)
        assert isinstance(end, blocks.End) and end.damage is None
        assert [text for part in parts for text in part.rows.column("text").to_pylist()] == texts
        assert max(part.rows.nbytes for part in parts if part.rows.num_rows > 1) <= 3000
        assert sum(part.rows.nbytes for part in parts) / len(parts) > 1000


def test_memory_keeps_to_its_bound_whatever_the_number_of_workers(tokenizer_dir: Path, tmp_path: Path) -> None:
    """140 MB in one row group."""
    texts = [generated_text(seed, 3000) for seed in range(30)]
    texts = [f"{number} {texts[number % 30][number // 30 :]}" for number in range(6000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet")
    arguments = ["--input", tmp_path / "d.parquet", "--tokenizer", tokenizer_dir, "--output", tmp_path / "x"]
    command = [TOOL, *arguments, "--num-workers", "64", "--max-memory", "512MiB"]
    peak = "import resource, subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True);"
    peak += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"  # in KiB
    result = subprocess.run([sys.executable, "-c", peak, *map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.splitlines()[-1]) < 512 << 10


def test_shards_hold_the_documents_in_order_and_keep_to_their_size(tokenizer_dir: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "in", 3, 100)
    whole = index(IndexOptions([tmp_path / "in"], tokenizer_dir, tmp_path / "whole"))
    options = IndexOptions([tmp_path / "in"], tokenizer_dir, tmp_path / "set", shard_size="10KB")
    manifests = index_shards(options)
    prefixes = [tmp_path / f"set-{i:05d}-of-{len(manifests):05d}" for i in range(len(manifests))]
    assert read_manifests(prefixes) == manifests == [verify(prefix) for prefix in prefixes]
    assert b"".join(Path(f"{prefix}.bin").read_bytes() for prefix in prefixes) == (tmp_path / "whole.bin").read_bytes()
    sizes = [Path(f"{prefix}.bin").stat().st_size for prefix in prefixes]
    assert max(sizes) <= 10_000 and min(sizes[:-1]) > 9_000
    assert sum(manifest.counts.documents for manifest in manifests) == whole.counts.documents
    assert sum(source.documents for manifest in manifests for source in manifest.sources) == 300
    assert index_shards(options) == manifests
    with pytest.raises(UserError, match="join was document_thinking, now document_only"):
        index_shards(replace(options, join=Join.document_only))
    with pytest.raises(UserError, match="--shard-size in bytes was 10000, now 11000"):
        index_shards(replace(options, shard_size="11KB"))
    # A document larger than a shard has one to itself.
    tiny = index_shards(replace(options, output=tmp_path / "tiny", shard_size="2B"))
    assert len(tiny) == 300


def test_a_set_of_shards_that_is_not_whole_is_not_done(tokenizer_dir: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "in", 1, 100)
    options = IndexOptions([tmp_path / "in"], tokenizer_dir, tmp_path / "x", shard_size="5KB")
    num_shards = len(index_shards(options))
    for shard in (num_shards - 1, 1, 0):
        prefix = tmp_path / f"x-{shard:05d}-of-{num_shards:05d}"
        (tmp_path / "aside").mkdir()
        for path in tmp_path.glob(f"{prefix.name}.*"):
            path.rename(tmp_path / "aside" / path.name)
        with pytest.raises(UserError, match=f"no whole set of {num_shards} shards: {prefix} is missing; .*remove"):
            index_shards(options)
        for path in (tmp_path / "aside").iterdir():
            path.rename(tmp_path / path.name)
        (tmp_path / "aside").rmdir()
    (tmp_path / "x-00000-of-00001.bin").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/x-00000-of-00001 is of another set"):
        index_shards(options)


def test_sentences_are_sequences_and_documents_keep_their_bounds(tokenizer_dir: Path, tmp_path: Path) -> None:
    texts = ["One is here. Two is there! Three?", "Only one", "A b c. D e f."]
    records = [{"text": text, "thinking": "Hm. Yes it is." if i == 0 else None} for i, text in enumerate(texts)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = IndexOptions([tmp_path / "d.jsonl"], tokenizer_dir, tmp_path / "ours", sentences=True)
    manifest = index(options)
    tokenizer = Tokenizer(tokenizer_dir)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for i, text in enumerate(texts):
        parts = [tokenizer.encode(sentence) for sentence in sentences.split(text)]
        if i == 0:
            first, second = sentences.split("\nHm. Yes it is.\n")
            parts += [[2, *tokenizer.encode(first)], [*tokenizer.encode(second), 3]]
        parts[-1] += [0]
        builder.add_document(numpy.concatenate(parts), [len(part) for part in parts])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()
    assert (manifest.counts.documents, manifest.counts.sequences) == (3, 7)
    assert verify(tmp_path / "ours") == manifest and index(options) == manifest
    with pytest.raises(UserError, match="choice of --sentences"):
        index(replace(options, sentences=False))


def test_interleaved_thinking_is_marked_block_by_block(tokenizer_dir: Path, tmp_path: Path) -> None:
    chunks = [
        {"text_end": 4, "thinking_end": 3},
        {"text_end": 6, "thinking_end": 3},
        {"text_end": 9, "thinking_end": 7},
    ]
    record = {"text": "koritheba", "thinking": "one two", "meta": {"chunks": chunks}}
    lines = [record, {"text": "plain", "thinking": "x"}, {"text": "b", "meta": {"chunks": [3]}}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = IndexOptions([tmp_path / "d.jsonl"], tokenizer_dir, tmp_path / "x", join=Join.interleaved)
    with pytest.raises(UserError, match=r"d.jsonl:3: bad chunks"):
        index(options)
    counts = index(replace(options, on_bad_record="skip")).counts
    encode = Tokenizer(tokenizer_dir).encode
    blocks = [encode("kori"), [2, *encode("\none\n"), 3], encode("th") + encode("eba"), [2, *encode("\ntwo\n"), 3], [0]]
    plain = [encode("plain"), [2, *encode("\nx\n"), 3], [0]]
    tokens = IndexReader(tmp_path / "x").tokens
    assert tokens.tolist() == [id for block in [*blocks, *plain] for id in block]
    marks = [block[0] == 2 for block in [*blocks, *plain] for _ in block]
    assert mark_thinking(numpy.asarray(tokens), [2], [3], 0).tolist() == marks
    assert (counts.thinking_tokens, counts.documents_with_thinking) == (sum(marks), 2)
    assert counts.skipped == {"bad chunks": 1}


def test_documents_may_end_without_a_token(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    options = IndexOptions([tmp_path / "d.jsonl"], tokenizer_dir, tmp_path / "x", append_eos=False)
    assert index(options) == verify(tmp_path / "x")
    encode = Tokenizer(tokenizer_dir).encode
    assert IndexReader(tmp_path / "x").tokens.tolist() == encode("one") + encode("two")


def test_documents_too_long_for_the_format_are_bad_records(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # "7<think>\\n4\\n</think>" and the end of the sequence are seven tokens.
    lines = ['{"text": "7"}', "", '{"text": "7", "thinking": "4"}', '{"text": "72", "thinking": "4"}', '{"text": "2"}']
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(writer, "MAX_DOCUMENT_TOKENS", 7)
    options = IndexOptions([tmp_path / "d.jsonl"], tokenizer_dir, tmp_path / "x")
    with pytest.raises(
        UserError, match=r"d.jsonl:4: too long \(.* holds 2,147,483,647 tokens\); .*--on-bad-record skip"
    ):
        index(options)
    counts = index(replace(options, on_bad_record="skip")).counts
    assert (counts.documents, counts.skipped) == (3, {"too long": 1})
    reader = IndexReader(tmp_path / "x")
    assert [len(reader.document(number)) for number in range(3)] == [2, 7, 2]


def test_an_index_without_documents_is_refused(documents: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    manifest = index(IndexOptions([documents], tokenizer_dir, tmp_path / "x"))
    replace(manifest, counts=replace(manifest.counts, documents=0)).write(tmp_path / "x")
    with pytest.raises(UserError, match="holds no document"):
        read_manifests([tmp_path / "x"])


def test_sizes_are_read_as_people_write_them(tokenizer_dir: Path) -> None:
    for wrong in ({"max_memory": "lots"}, {"max_memory": "1MB"}, {"shard_size": "0GB"}, {"num_workers": 0}):
        with pytest.raises(UserError, match=r"--(max-memory|shard-size|num-workers)"):
            IndexOptions([], tokenizer_dir, Path("x"), **wrong)


def test_manifests_of_earlier_versions_are_read(documents: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    manifest = index(IndexOptions([documents], tokenizer_dir, tmp_path / "x"))
    content = json.loads((tmp_path / "x.json").read_text())
    del content["append_eos"], content["parse_special_tokens"], content["counts"]["sequences"]
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert Manifest.read(tmp_path / "x") == manifest
