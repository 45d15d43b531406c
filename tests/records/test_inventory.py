"""Files that a job recorded are read only as it wrote them; what it did not record is read and said."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.records import Columns, Record, expand_sources, read_blocks, read_records, read_rows, write_records
from megatron_tpt.records.inventory import FOLDER, Entry, Inventory, write_inventory

NAMES = [f"part-{number:05d}.jsonl.zst" for number in range(3)]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder of three shards of different sizes, and rejects, all recorded."""
    folder = tmp_path / "job"
    for number, name in enumerate(NAMES):
        write_records(folder / name, [Record(f"{number}-{i}", f"document {i} " * 9) for i in range(3 + number)])
    write_records(folder / "rejects" / NAMES[0], [Record("r", "a reject")])
    Inventory(folder).add("task-00000", [*NAMES, f"rejects/{NAMES[0]}"])
    return folder


def empty(job: Path) -> None:
    (job / NAMES[1]).write_bytes(b"")


def truncate_by_a_byte(job: Path) -> None:
    os.truncate(job / NAMES[1], (job / NAMES[1]).stat().st_size - 1)


def end_at_a_frame(job: Path) -> None:
    """A whole Zstandard file, of which only the job knows that there was more."""
    write_records(job / NAMES[1], [Record("1-0", "document 0 " * 9)])


def append_a_frame(job: Path) -> None:
    (job / NAMES[1]).write_bytes((job / NAMES[1]).read_bytes() + (job / NAMES[0]).read_bytes())


def swap(job: Path) -> None:
    first, second = (job / name for name in NAMES[:2])
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def delete(job: Path) -> None:
    (job / NAMES[1]).unlink()


DAMAGE = [empty, truncate_by_a_byte, end_at_a_frame, append_a_frame, swap, delete]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("given", ["{}", "{}/part-*.jsonl.zst", "{}/../jo*", "{}/**"])
def test_a_recorded_file_that_is_not_as_it_was_written_is_refused_by_name(
    job: Path, given: str, damage: Callable[[Path], None]
) -> None:
    assert [source.path.name for source in expand_sources([given.format(job)]) if source.path][:3] == NAMES
    damage(job)
    with pytest.raises(UserError, match=r"job/part-0000[01].jsonl.zst.*(has [\d,]+ bytes|missing)"):
        expand_sources([given.format(job)])


def test_links_and_rejects_are_checked_where_they_lead(job: Path, tmp_path: Path) -> None:
    (tmp_path / "linked.jsonl.zst").symlink_to(job / NAMES[1])
    for path in (job / NAMES[1], job / "rejects" / NAMES[0]):
        os.truncate(path, 9)
    for given in (tmp_path / "linked.jsonl.zst", job / "rejects"):
        with pytest.raises(UserError, match="has 9 bytes, the job that wrote it recorded"):
            expand_sources([given])
    assert len(expand_sources([job / NAMES[0], job / NAMES[2]])) == 2  # of those that were named nothing is wrong


def test_what_no_job_recorded_is_read_and_said(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(job / "part-00007.jsonl.zst", [Record("x", "one more")])
    assert len(expand_sources([job])) == 4
    assert "1 file not recorded by the job that wrote this folder" in capsys.readouterr().err


def test_a_folder_without_inventory_is_read_as_it_is(job: Path) -> None:
    swap(job)
    shutil.rmtree(job / FOLDER)
    assert len(list(read_records([job]))) == 12


def test_content_of_equal_size_is_distinguished_by_the_checksum(job: Path) -> None:
    path = job / NAMES[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    sources = expand_sources([job])
    sources[0].require_content()
    with pytest.raises(UserError, match=r"part-00001.jsonl.zst: its content is not what"):
        sources[1].require_content()


def test_the_highest_revision_holds_and_truncated_lines_do_not(job: Path) -> None:
    (job / NAMES[1]).unlink()
    Inventory(job).add("task-00009", [NAMES[1]])
    with (job / FOLDER / "task-00009.jsonl").open("a") as file:
        file.write('{"name": "part-00000.jso')
    write_records(job / NAMES[0], [Record("new", "written anew")])
    Inventory(job).add("task-00009", [NAMES[0]])
    assert [source.path.name for source in expand_sources([job]) if source.path] == [NAMES[0], NAMES[2]]
    assert {entry.revision for entry in Inventory(job).entries.values()} == {0, 1}


@pytest.mark.parametrize("value", [[], {}, "1", 1.5, True, None])
@pytest.mark.parametrize("field", ["name", "bytes", "checksum", "revision"])
def test_a_line_with_a_value_of_another_type_does_not_count(field: str, value: object, job: Path) -> None:
    with (job / FOLDER / "task-00001.jsonl").open("w") as file:
        file.write(json.dumps(asdict(Entry.of(job, NAMES[0])) | {"revision": 9} | {field: value}) + "\n")
    entry = Inventory(job).entries[NAMES[0]]
    is_right = (field, value) in (("bytes", None), ("name", "1"), ("checksum", "1"))
    assert entry.revision == (9 if is_right and field != "name" else 0)
    list(Inventory(job).differences())


def test_an_inventory_is_replaced_whole(job: Path) -> None:
    write_inventory(job, "task-00000", [asdict(Entry.of(job, NAMES[0]))])
    assert list(Inventory(job).entries) == [NAMES[0]]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.jsonl.zst", "x.jsonl.bz2", "x.jsonl.xz",
                                  "x.parquet", "x.arrow"])  # fmt: skip
@pytest.mark.parametrize("given", ["", "x.*", "{}"])
def test_a_file_of_no_bytes_is_no_input(tmp_path: Path, name: str, given: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name}: has no bytes"):
        expand_sources([tmp_path / "a.jsonl", tmp_path / given.format(name)])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
def test_files_are_closed_without_waiting_for_garbage_to_be_collected(tmp_path: Path, suffix: str) -> None:
    if suffix == ".jsonl":
        (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"t {i}"}) + "\n" for i in range(9)))
    else:
        write_records(tmp_path / f"x{suffix}", [Record(str(i), f"t {i}") for i in range(9)])
    (source,) = expand_sources([tmp_path])
    list(read_rows(source))  # imports
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            next(read_rows(source))
            for _, rows in read_blocks(source, Columns(), 4, lambda block: block == 1):
                next(rows)
        assert len(os.listdir("/proc/self/fd")) <= before
    finally:
        gc.enable()
