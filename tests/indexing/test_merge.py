"""tools/merge_index.py: the merger of shards is the index of their input, and nothing unlike gets in."""

import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.merge import expand_prefixes, merge
from megatron_tpt.indexing.merge_options import MergeOptions
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.verification import verify
from megatron_tpt.records import read_records, write_records

TOOL = Path(__file__).parents[2] / "tools" / "merge_index.py"
KINDS = ("bin", "idx", "json")
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def parts(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The documents in files of unequal size."""
    folder = tmp_path_factory.mktemp("parts")
    records = list(read_records([documents]))
    bounds = [0, 1, 300, 1100, 2000]
    paths = [folder / f"part-{number}.jsonl" for number in range(len(bounds) - 1)]
    for path, first, last in zip(paths, bounds[:-1], bounds[1:], strict=True):
        write_records(path, records[first:last])
    return paths


@pytest.fixture(scope="module")
def shards(parts: list[Path], tokenizer_dir: Path) -> list[Path]:
    prefixes = [path.with_suffix("") for path in parts]
    for path, prefix in zip(parts, prefixes, strict=True):
        index(IndexOptions(input=[path], tokenizer=tokenizer_dir, output=prefix))
    return prefixes


def contents(prefix: Path, kinds: tuple[str, ...] = ("bin", "idx")) -> list[bytes]:
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in kinds]


def copy(shard: Path, target: Path) -> Path:
    for kind in KINDS:
        shutil.copyfile(f"{shard}.{kind}", f"{target}.{kind}")
    return target


def edit_manifest(prefix: Path, **changes: object) -> None:
    dataclasses.replace(Manifest.read(prefix), **changes).write(prefix)


def test_merging_shards_is_indexing_all_of_the_input(
    shards: list[Path], parts: list[Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    whole, merged = tmp_path / "whole", tmp_path / "merged"
    expected = index(IndexOptions(input=parts, tokenizer=tokenizer_dir, output=whole))
    expected = expected if isinstance(expected, Manifest) else Manifest.read(whole)
    command = [sys.executable, TOOL, "--input", *shards, "--output", merged]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "4 indices, 2,000 documents" in result.stdout
    assert contents(merged) == contents(whole)
    assert dataclasses.replace(verify(merged), command=[]) == dataclasses.replace(expected, command=[])


def test_megatron_core_reads_the_merger(shards: list[Path], tmp_path: Path) -> None:
    from megatron_tpt import platform  # noqa: F401  (before Megatron Core)

    from megatron.core.datasets.indexed_dataset import IndexedDataset

    merge(MergeOptions(tmp_path / "merged", [str(shard) for shard in shards]))
    merged = IndexedDataset(str(tmp_path / "merged"))
    number = 0
    for shard in shards:
        for document in IndexedDataset(str(shard)):
            numpy.testing.assert_array_equal(merged[number], document)
            number += 1
    assert number == len(merged) == 2000


def test_documents_of_several_sequences_are_merged_as_megatron_core_does(tmp_path: Path) -> None:
    """Indices of Megatron's own builder, without manifests."""
    import torch

    from megatron_tpt import platform  # noqa: F401  (before Megatron Core)

    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = numpy.random.default_rng(0)
    names = [str(tmp_path / f"shard-{number}") for number in range(3)]
    for name in names:
        builder = IndexedDatasetBuilder(f"{name}.bin", numpy.int32)
        for _ in range(20):
            lengths = rng.integers(1, 9, rng.integers(1, 4)).tolist()
            builder.add_document(torch.from_numpy(rng.integers(0, 99_000, sum(lengths))), lengths)
        builder.finalize(f"{name}.idx")
    reference = IndexedDatasetBuilder(str(tmp_path / "reference.bin"), numpy.int32)
    for name in names:
        reference.add_index(name)
    reference.finalize(str(tmp_path / "reference.idx"))

    with pytest.raises(UserError, match=r"shard-0\.json: no such index"):
        merge(MergeOptions(tmp_path / "merged", names))
    assert merge(MergeOptions(tmp_path / "merged", names, require_manifests=False)) is None
    assert contents(tmp_path / "merged") == contents(tmp_path / "reference")
    assert not Manifest.path(tmp_path / "merged").exists()


def test_shards_are_named_by_prefix_file_glob_folder_and_list(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards[0].parent
    (tmp_path / "list").write_text("\n".join([*map(str, shards[1:]), ""]))
    output = folder / "merged"
    for inputs, list_file in (
        ([str(folder)], None),
        ([f"{folder}/part-*"], None),
        ([f"{folder}/part-*.idx"], None),
        ([f"{shard}.bin" for shard in shards], None),
        ([str(shards[0])], tmp_path / "list"),
    ):
        assert expand_prefixes(inputs, list_file, output) == shards
    (tmp_path / "link").symlink_to(folder)
    for suffix in (".bin", ".idx", ".json"):  # of an earlier run
        Path(f"{output}{suffix}").write_bytes(Path(f"{shards[0]}{suffix}").read_bytes())
    capsys.readouterr()
    assert expand_prefixes([str(folder)], None, tmp_path / "link" / "merged") == shards
    assert capsys.readouterr().err == f"{folder}: {output} is the output, and not merged into itself\n"
    for inputs, message in (
        ([], "no indices were given"),
        ([f"{folder}/other-*"], "no index found"),
        ([str(tmp_path)], "no index found"),
        ([str(shards[0]), str(folder)], "named twice"),
        ([str(shards[0]), str(output)], None),
    ):
        if message is None:
            inputs, message = [str(output)], "is the output too"
        with pytest.raises(UserError, match=message):
            expand_prefixes(inputs, None, output)


def test_a_glob_over_a_set_of_shards_with_a_hole_is_refused_and_a_part_asked_for_by_name_is_not(
    shards: list[Path], tmp_path: Path
) -> None:
    whole = [copy(shards[0], tmp_path / f"train-{number:05d}-of-00003") for number in range(3)]
    for inputs in (f"{tmp_path}/train-*", str(tmp_path)):
        assert expand_prefixes([inputs], None, tmp_path / "merged") == whole
    Path(f"{whole[1]}.idx").unlink()
    for inputs in (f"{tmp_path}/train-*", str(tmp_path)):
        with pytest.raises(UserError, match=r"1 of 3 shards missing: .*-00001-of-00003\.idx is"):
            expand_prefixes([inputs], None, tmp_path / "merged")
    assert expand_prefixes([str(whole[0]), str(whole[2])], None, tmp_path / "merged") == [whole[0], whole[2]]


def test_the_same_merger_again_is_left_alone_and_another_refused(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for shard in shards:
        copy(shard, tmp_path / shard.name)
    options = MergeOptions(tmp_path / "merged", [str(tmp_path)])  # the output is in the folder of the shards
    first = merge(options)
    before = [Path(f"{options.output}.{kind}").stat().st_mtime_ns for kind in KINDS]
    assert merge(options) == first
    assert "already done" in capsys.readouterr().out
    assert [Path(f"{options.output}.{kind}").stat().st_mtime_ns for kind in KINDS] == before
    with pytest.raises(UserError, match="choose another --output"):
        merge(MergeOptions(options.output, [str(shards[0])]))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"join": "document_only"}, "join"),
        ({"think": {"open": [1], "close": [2]}}, "think"),
        ({"tokenizer": {"fingerprint": "sha256:other"}}, "tokenizer"),
        ({"tokenizer": {"eos_id": 5}}, "tokenizer"),
    ],
)
def test_shards_that_do_not_go_together_are_both_named(
    changes: dict, name: str, shards: list[Path], tmp_path: Path
) -> None:
    other = copy(shards[1], tmp_path / "other")
    path = Manifest.path(other)
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"part-0 and {other} cannot be merged: {name} is"):
        merge(MergeOptions(tmp_path / "merged", [str(shards[0]), str(other)]))
    assert not list(tmp_path.glob("*merged*"))


def test_another_token_type_is_refused(shards: list[Path], documents: Path, word_tokenizer_dir: Path, tmp_path: Path):
    wide = tmp_path / "wide"
    from megatron_tpt.indexing.writer import IndexWriter

    with IndexWriter(Path(f"{wide}.bin"), Path(f"{wide}.idx"), 70_000) as writer:
        writer.add_document(numpy.array([1, 2, 3]))
    with pytest.raises(UserError, match="token type is uint16 in the one and int32"):
        merge(MergeOptions(tmp_path / "merged", [str(shards[0]), str(wide)], require_manifests=False))


def test_the_same_tokenizer_may_lie_in_several_places(shards: list[Path], tmp_path: Path) -> None:
    other = copy(shards[1], tmp_path / "other")
    edit_manifest(other, tokenizer=dataclasses.replace(Manifest.read(other).tokenizer, path="/elsewhere"))
    assert merge(MergeOptions(tmp_path / "merged", [str(shards[0]), str(other)])) is not None


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_a_damaged_shard_is_named_and_leaves_nothing(kind: str, shards: list[Path], tmp_path: Path) -> None:
    other = copy(shards[1], tmp_path / "other")
    with Path(f"{other}.{kind}").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 255]))
    with pytest.raises(UserError, match=rf"other\.{kind}: damaged"):
        merge(MergeOptions(tmp_path / "merged", [str(shards[0]), str(other)]))
    assert not list(tmp_path.glob("*merged*"))


def test_too_little_space_is_seen_before_anything_is_written(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs [\d,]+ bytes and 1,000 are free"):
        merge(MergeOptions(tmp_path / "merged", [str(shard) for shard in shards]))
    assert not list(tmp_path.iterdir())


def merge_slowly(options: MergeOptions) -> None:
    """Wait before every step that another process could see."""
    for name in ("pwrite", "replace", "fsync"):
        action = getattr(os, name)
        setattr(os, name, lambda *args, action=action: (time.sleep(0.01), action(*args))[1])
    merge(options)


def test_a_merger_killed_at_any_moment_is_whole_after_the_next_run(shards: list[Path], tmp_path: Path) -> None:
    options = MergeOptions(tmp_path / "whole", [str(shard) for shard in shards])
    merge(options)
    expected = contents(options.output)
    for moment in range(10):
        killed = dataclasses.replace(options, output=tmp_path / f"killed-{moment}")
        process = fork.Process(target=merge_slowly, args=(killed,))
        process.start()
        time.sleep(0.03 * moment)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if Manifest.path(killed.output).exists():
            assert contents(killed.output) == expected
        merge(killed)
        assert contents(killed.output) == expected
        verify(killed.output)
        assert not list(tmp_path.glob(f".tmp-killed-{moment}*"))


def test_many_shards_need_few_open_files(shards: list[Path], tmp_path: Path) -> None:
    for number in range(300):
        copy(shards[0], tmp_path / f"shard-{number:03}")

    def merge_with_few_files() -> None:
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 80, used + 80))
        merge(MergeOptions(tmp_path / "merged", [str(tmp_path)]))

    process = fork.Process(target=merge_with_few_files)
    process.start()
    process.join()
    assert process.exitcode == 0
    merged = IndexReader(tmp_path / "merged")
    assert merged.num_documents == 300
    numpy.testing.assert_array_equal(merged.document(299), IndexReader(shards[0]).document(0))
