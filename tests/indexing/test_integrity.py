"""Indices are opened only as they were written, and working folders hold nothing that others have planted."""

import errno
import fcntl
import os
import random
import shutil
from pathlib import Path

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.journal import working_folder, working_path
from megatron_tpt.indexing.merge import merge
from megatron_tpt.indexing.merge_options import MergeOptions
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.source_manifests import read_manifests
from megatron_tpt.records import Record, write_records
from megatron_tpt.records.inventory import Inventory


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    return [Record(str(i), "word " * (1 + i)) for i in range(20)]


def make_index(tokenizer: Path, folder: Path, name: str, records: list[Record]) -> Path:
    write_records(folder / f"{name}.jsonl", records)
    index(IndexOptions([folder / f"{name}.jsonl"], tokenizer, folder / name))
    return folder / name


def test_an_idx_of_another_build_of_the_same_size_is_refused(
    records: list[Record], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """The same documents in another order: as many tokens, as many documents."""
    one = make_index(tokenizer_dir, tmp_path, "one", records)
    two = make_index(tokenizer_dir, tmp_path, "two", random.Random(1).sample(records, len(records)))
    shutil.copyfile(f"{two}.idx", f"{one}.idx")
    assert len(IndexReader(one)) == len(records)  # only the checksum shows it
    for open_it in (lambda: read_manifests([one]), lambda: merge(MergeOptions(tmp_path / "m", [str(one), str(two)]))):
        with pytest.raises(UserError, match=r"one.idx: damaged, or of another index"):
            open_it()


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_a_file_that_lacks_a_byte_is_refused_wherever_it_is_opened(
    kind: str, records: list[Record], tokenizer_dir: Path, tmp_path: Path
) -> None:
    prefix = make_index(tokenizer_dir, tmp_path, "x", records)
    os.truncate(f"{prefix}.{kind}", Path(f"{prefix}.{kind}").stat().st_size - 1)
    for open_it in (
        lambda: read_manifests([prefix]),
        lambda: merge(MergeOptions(tmp_path / "m", [str(prefix)])),
        lambda: index(IndexOptions([tmp_path / "x.jsonl"], tokenizer_dir, prefix)),
    ):
        with pytest.raises(UserError, match=rf"x.{kind} has \d+ bytes"):
            open_it()


def test_a_shard_whose_content_changed_is_not_indexed(
    records: list[Record], tokenizer_dir: Path, tmp_path: Path
) -> None:
    job = tmp_path / "job"
    write_records(job / "part-00000.jsonl", records)
    Inventory(job).add("task-00000", ["part-00000.jsonl"])
    content = (job / "part-00000.jsonl").read_bytes()
    (job / "part-00000.jsonl").write_bytes(content.replace(b"word", b"wort"))
    with pytest.raises(UserError, match=r"part-00000.jsonl: its content is not what the job that wrote it recorded"):
        index(IndexOptions([job], tokenizer_dir, tmp_path / "x"))
    assert not list(tmp_path.glob("x.*"))


def test_many_small_files_give_the_index_of_their_documents(
    records: list[Record], tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With blank lines, without an end of the last line, with nothing in them, and a large file between."""
    lines = [f'{{"text": "{record.text}"}}' for record in records]
    contents = [f"{line}\n" for line in lines]
    contents[3:3] = ["\n\n"]
    contents[5] = contents[5].removesuffix("\n")
    contents[7] = "\n" + contents[7]
    contents[9] += contents[9] * 3000
    for number, content in enumerate(contents):
        (tmp_path / f"{number:02d}.jsonl").write_text(content)
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "all.jsonl").write_text("\n".join(contents))
    files = sorted(tmp_path.glob("*.jsonl"))
    many = index(IndexOptions(files, tokenizer_dir, tmp_path / "many"))
    one = index(IndexOptions([tmp_path / "all" / "all.jsonl"], tokenizer_dir, tmp_path / "one"))
    assert many.checksums == one.checksums
    assert [source.documents for source in many.sources][:5] == [1, 1, 1, 0, 1]
    assert "03.jsonl: holds no rows" not in capsys.readouterr().err  # blank lines are rows, which make no document
    (tmp_path / "20.jsonl").write_text('{"text": "good"}\n\n{"text": 5}\n')
    with pytest.raises(UserError, match=r"20.jsonl:3: "):
        index(IndexOptions(files, tokenizer_dir, tmp_path / "bad"))


def plant_link(working: Path, victim: Path) -> None:
    working.symlink_to(victim)


def plant_dangling_link(working: Path, victim: Path) -> None:
    working.symlink_to(victim / "nothing")


def plant_file_links(working: Path, victim: Path) -> None:
    working.mkdir()
    for name in ("00000.bin", "00000.idx", "journal", "examples"):
        (working / name).symlink_to(victim / "file")


@pytest.mark.parametrize("plant", [plant_link, plant_dangling_link, plant_file_links])
def test_nothing_is_written_through_links_in_the_place_of_the_working_folder(
    plant, records: list[Record], tokenizer_dir: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    plant(working_path(tmp_path / "x"), victim)
    write_records(tmp_path / "d.jsonl", records)
    try:
        index(IndexOptions([tmp_path / "d.jsonl"], tokenizer_dir, tmp_path / "x"))
    except UserError as error:
        assert ".tmp-x" in str(error) or "cannot be written" in str(error)
    assert [path.name for path in victim.iterdir()] == ["file"] and (victim / "file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give a folder to another user")
def test_a_working_folder_of_another_user_is_refused_where_anyone_may_write(tmp_path: Path) -> None:
    folder = working_path(tmp_path / "x")
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    tmp_path.chmod(0o777)
    with working_folder(tmp_path / "x"):
        pass  # a folder that a group shares
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    tmp_path.chmod(0o1777)
    with pytest.raises(UserError, match="made by another user"), working_folder(tmp_path / "x"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EINVAL])
def test_without_locks_indexing_is_refused_unless_they_are_turned_off(
    code: int, records: list[Record], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"file system without locks .* MEGATRON_TPT_NO_LOCKS=1"):
        make_index(tokenizer_dir, tmp_path, "x", records)
    monkeypatch.setenv("MEGATRON_TPT_NO_LOCKS", "1")
    assert len(IndexReader(make_index(tokenizer_dir, tmp_path, "x", records))) == len(records)
