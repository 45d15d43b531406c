"""What the user names, as sources: files, folders, patterns, saved data sets and data sets as on the Hub."""

import glob
import json
import os
import pickle
import shutil
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from megatron_tpt.errors import Fault, UserError
from megatron_tpt.records import (
    DAMAGED,
    Columns,
    Record,
    expand_inputs,
    expand_sources,
    read_blocks,
    read_records,
    write_records,
)
from megatron_tpt.records.hub import HubDataset

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def names(inputs: list[str], folder: Path) -> list[str]:
    return [os.path.relpath(source.name, folder) for source in expand_sources(inputs)]


def lay_out(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "x"}\n')
    return folder


def test_patterns_match_record_files_sorted(tmp_path: Path) -> None:
    folder = lay_out(
        tmp_path / "d",
        *("b.jsonl.zst", "a.jsonl.zst", "c.parquet", "sub/d.jsonl.zst", "sub/e.json.gz", "README.md", "run.json"),
    )
    (folder / "run.json").write_text('{"steps": 3}')
    assert names([f"{folder}/*.jsonl.zst"], folder) == ["a.jsonl.zst", "b.jsonl.zst"]
    assert names([f"{folder}/*"], folder) == [
        "a.jsonl.zst",
        "b.jsonl.zst",
        "c.parquet",
        "sub/d.jsonl.zst",
        "sub/e.json.gz",
    ]
    assert names([f"{folder}/**/*.zst"], folder) == ["a.jsonl.zst", "b.jsonl.zst", "sub/d.jsonl.zst"]
    assert sorted(names([f"{folder}/**"], folder)) == names([str(folder)], folder)
    assert names([f"{folder}/*.json"], folder) == ["run.json"]
    with pytest.raises(UserError, match="nothing matches"):
        expand_sources([f"{folder}/*.csv"])


def lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_links_to_folders_are_followed_and_loops_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lay_out(tmp_path / "d", "fr/b.jsonl")
    lay_out(tmp_path / "elsewhere", "a.jsonl", "deep/c.ndjson")
    (folder / "en").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "third").symlink_to(lay_out(tmp_path / "third", "d.JSONL"))
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to("..")
    (folder / "all").symlink_to(tmp_path)
    (folder / "fr" / "again").symlink_to(tmp_path / "third")
    expected = ["en/a.jsonl", "en/deep/c.ndjson", "fr/again/d.JSONL", "fr/b.jsonl"]
    assert names([str(folder)], folder) == expected
    (line,) = lines_on_stderr(capsys)
    assert line == (
        f"{folder}: 3 names are not read: all, en/deep/third, en/deep/up (linked, but read already or a folder above)"
    )


def test_every_file_of_a_folder_is_read_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lay_out(
        tmp_path / "d",
        *("a.JSONL", "b.ndjson.xz", "c.json.BZ2", "d.parquet", "e.arrow", "sub/f.jsonl.gz"),
        *("data.csv", "x.jsonl.br", "x.jsonl.1", "readme", ".hidden.jsonl", ".git/x.jsonl", "rejects/x.jsonl"),
    )
    contents = {
        "array.json": '[{"q": 1}, {"q": 2}]',
        "lines.json": '{"q": 1}\n{"q": 2}\n',
        "one.json": '{\n "id": 1,\n "text": "x"\n}',
        "config.json": '{\n "hidden_size": 1\n}',
        "ids.json": "[1, 2]",
        "dataset_info.json": '{"features": {"text": {"dtype": "string"}}}',
        "broken.json": '[{"q": 1},',
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    expected = ["a.JSONL", "array.json", "b.ndjson.xz", "broken.json", "c.json.BZ2", "d.parquet", "e.arrow"]
    assert names([str(folder)], folder) == [*expected, "lines.json", "one.json", "sub/f.jsonl.gz"]
    (line,) = lines_on_stderr(capsys)
    assert line.startswith(f"{folder}: 10 names are not read: ")
    for part in (
        "data.csv, readme, x.jsonl.1, x.jsonl.br (of other kinds)",
        ".git/, .hidden.jsonl (hidden)",
        "config.json, dataset_info.json, ids.json (taken for settings",
        "rejects/ (of what a job rejected",
    ):
        assert part in line
    assert names([str(folder / "config.json")], folder) == ["config.json"]


def test_a_pattern_reads_or_refuses_what_it_matches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lay_out(tmp_path / "d", "x-1.jsonl", "x-2.jsonl.br", "sub/x-3.csv", "y.txt")
    with pytest.raises(UserError, match=r"x-\*: matches .*/x-2\.jsonl\.br, which is not of a kind that is read"):
        expand_sources([f"{folder}/x-*"])
    with pytest.raises(UserError, match=r"matches .*/sub/x-3\.csv"):
        expand_sources([f"{folder}/**/x-*[13]*"])
    with pytest.raises(UserError, match=r"nothing matches this pattern .*sub/x-3\.csv \(of other kinds\)"):
        expand_sources([f"{folder}/s*"])
    assert names([f"{folder}/*"], folder) == ["x-1.jsonl"]
    (line,) = lines_on_stderr(capsys)
    assert "3 names are not read" in line and "x-2.jsonl.br" in line and "x-3.csv" in line and "y.txt" in line


def test_patterns_match_as_those_of_glob_and_end_where_links_lead_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lay_out(
        tmp_path / "d",
        *("a.jsonl", "x/b.jsonl", "x/y/c.jsonl", "x/y/d.ndjson", "x/.h/e.jsonl", ".h/f.jsonl", "z[1]/x/g.jsonl"),
    )
    (folder / "x" / "z").symlink_to(folder / "z[1]")
    monkeypatch.chdir(tmp_path)
    patterns = [
        "**/*.jsonl",
        "x/**/*.jsonl",
        "**/x/*.jsonl",
        "**/y/**/[cd].*",
        "*/**/*.jsonl",
        "**/.h/*.jsonl",
        "**/x/**",
    ]
    for pattern in (f"{start}{each}" for start in (f"{folder}/", "d/") for each in patterns):
        expected = {Path(match).resolve() for match in glob.glob(pattern, recursive=True)}
        expected = {path for path in expected if path.is_file()}
        assert {source.path.resolve() for source in expand_sources([pattern]) if source.path} == expected, pattern
    for number in range(4):
        (folder / "x" / f"loop{number}").symlink_to("..")
    (folder / "z[1]" / "other").symlink_to(folder / "x")
    capsys.readouterr()
    assert len(expand_sources([f"{folder}/**/*.jsonl"])) == 4
    assert "loop0" in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing matches"):
        expand_sources([f"{folder}/**/*.csv"])


def test_links_to_nothing_are_refused(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "d", "a.jsonl")
    (folder / "b.jsonl").symlink_to("missing.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl: a link to missing\.jsonl, which is not there"):
        expand_sources([folder])
    with pytest.raises(UserError, match=r"matches .*b\.jsonl, which is a link to nothing"):
        expand_sources([f"{folder}/*.jsonl"])


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        (b"caf\xe9.jsonl", r"caf\xe9.jsonl"),
        (b"a\nb.jsonl", r"a\nb.jsonl"),
        ("a\u2028b.jsonl".encode(), r"a\u2028b.jsonl"),
    ],
)
@pytest.mark.parametrize("place", ["file", "folder", "link"])
def test_names_that_no_manifest_can_hold_are_refused(tmp_path: Path, name: bytes, escaped: str, place: str) -> None:
    odd = os.fsdecode(name)
    if place == "file":
        path = lay_out(tmp_path, odd) / odd
        inputs = [path, tmp_path, tmp_path / "*.jsonl"]
    elif place == "folder":
        inputs = [lay_out(tmp_path, f"{odd}/x.jsonl")]
    else:
        lay_out(tmp_path / "real", odd)
        (tmp_path / "link.jsonl").symlink_to(tmp_path / "real" / odd)
        inputs = [tmp_path / "link.jsonl"]
    for each in inputs:
        with pytest.raises(UserError) as error:
            expand_sources([each])
        assert escaped in str(error.value) and "rename" in str(error.value)
        str(error.value).encode()


def test_names_in_other_scripts_are_fine_and_odd_names_that_are_not_read_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lay_out(tmp_path / "d", "文書\u3000é.jsonl", os.fsdecode(b"caf\xe9.txt"))
    assert names([str(folder)], folder) == ["文書\u3000é.jsonl"]
    (line,) = lines_on_stderr(capsys)
    assert r"caf\xe9.txt (of other kinds)" in line


def test_what_a_job_left_out_is_read_only_when_it_is_named(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "d", "a.jsonl", "rejects/b.jsonl", "empty/notes.txt")
    for text in (folder, f"{folder}/*", f"{folder}/**", f"{folder}/**/*.jsonl"):
        assert names([str(text)], folder) == ["a.jsonl"]
    for text in (folder / "rejects", f"{folder}/rejects/*"):
        assert names([str(text)], folder) == ["rejects/b.jsonl"]


def test_what_is_named_twice_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lay_out(tmp_path / "d", "a.jsonl", "b.jsonl")
    assert names([f"{folder}/b.jsonl", f"{folder}/*.jsonl", str(folder)], folder) == ["b.jsonl", "a.jsonl"]
    (line,) = lines_on_stderr(capsys)
    assert line.startswith("2 inputs given or found under several names; each is read once: ")
    monkeypatch.chdir(folder)
    (tmp_path / "link").symlink_to(folder)
    (folder / "c.jsonl").symlink_to("a.jsonl")
    spellings = ["a.jsonl", str(folder), f"{tmp_path}/link/*", "../d/b.jsonl", "."]
    assert [source.name for source in expand_sources(spellings)] == ["a.jsonl", f"{folder}/b.jsonl"]


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "d[1]", "a*.jsonl", "ab.jsonl")
    assert names([f"{folder}/a*.jsonl"], folder) == ["a*.jsonl"]
    assert names([str(folder)], folder) == ["a*.jsonl", "ab.jsonl"]


def test_the_home_folder_is_known_in_quoted_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path / "d", "a.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names(["~/d/*.jsonl"], tmp_path) == ["d/a.jsonl"]


def test_sources_know_their_size_and_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "d", "a.jsonl")
    (source,) = expand_sources([folder])
    assert (source.num_bytes, source.path) == (14, folder / "a.jsonl")
    assert pickle.loads(pickle.dumps(source)) == source


def test_a_saved_data_set_is_its_arrow_files(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "n": i} for i in range(50)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "cache-123.arrow").write_bytes(b"left by map")
    sources = expand_sources([tmp_path / "saved"])
    assert len(sources) == 3 and all(source.path for source in sources)
    records = list(read_records([tmp_path / "saved"], id_column="n"))
    assert [(r.id, r.text) for r in records] == [(str(i), f"text {i}") for i in range(50)]

    (tmp_path / "saved" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00003\.arrow: cannot be read"):
        expand_sources([tmp_path / "saved"])
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="description as a saved data set is broken"):
        expand_sources([tmp_path / "saved"])

    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "one")
    assert list(read_records([tmp_path / "one"], id_column="n")) == records
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match=r"several splits; name one: .*two/train, .*two/test"):
        expand_sources([tmp_path / "two"])
    assert list(read_records([tmp_path / "two" / "test"], id_column="n")) == records


def test_an_arrow_file_of_the_other_kind_and_a_broken_one(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"]})
    path = tmp_path / "x.arrow"
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    assert [r.text for r in read_records([path])] == ["a", "b"]
    for content in (b"garbage" * 100, path.read_bytes()[:100], b"ARROW1"):
        path.write_bytes(content)
        (source,) = expand_sources([path])
        rows = [row for _, rows in read_blocks(source, Columns(), 10, bool) for row in rows]
        assert rows == []  # block 0 is not wanted
        rows = [row for _, rows in read_blocks(source, Columns(), 10, lambda _: True) for row in rows]
        assert [row.problem for row in rows] == [DAMAGED]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A data set's folder as it is on the Hub: two training files of Parquet and one for testing."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for i, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"]):
        texts = [f"{name} {row}" for row in range(1000)]
        table = pyarrow.table({"text": texts, "row": range(1000 * i, 1000 * i + 1000)})
        pyarrow.parquet.write_table(table, folder / "data" / f"{name}.parquet", row_group_size=300)
    return folder


def test_the_shards_of_a_streamed_data_set_are_its_sources(repository: Path) -> None:
    url = f"hf://{repository}"
    sources = expand_sources([url])
    assert [source.name for source in sources] == [f"{url}#00000-of-00002", f"{url}#00001-of-00002"]
    assert pickle.loads(pickle.dumps(sources)) == sources
    for i, source in enumerate(sources):
        blocks = read_blocks(source, Columns(id="row", meta=("row",)), 70, lambda k: k in (0, 7, 14))
        rows = {k: list(rows) for k, rows in blocks}
        assert [len(part) for part in rows.values()] == [70, 70, 20]
        for k, part in rows.items():
            assert [row.number for row in part] == list(range(70 * k, min(70 * k + 70, 1000)))
            for row in part:
                number = 1000 * i + row.number
                expected = Record(str(number), f"train-0000{i}-of-00002 {row.number}", meta={"row": number})
                assert row.record == expected
    assert len(list(read_records([f"{url}?split=test"]))) == 1000


def test_a_streamed_data_set_that_breaks_ends_with_a_row_that_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    lines = [json.dumps({"text": f"text {i}"}) for i in range(10)]
    (folder / "train.jsonl").write_text("\n".join([*lines, "{broken"]))
    (source,) = expand_sources([f"hf://{folder}"])
    rows = [row for _, rows in read_blocks(source, Columns(), 4, lambda _: True) for row in rows]
    assert rows[-1].problem == DAMAGED and all(row.record for row in rows[:-1])
    with pytest.raises(UserError, match="no column 'content'; its columns are text"):
        list(read_records([f"hf://{lay_out(tmp_path / 'other', 'train.jsonl')}"], text_column="content"))


def test_names_of_data_sets() -> None:
    parse = HubDataset.parse
    assert parse("hf://owner/name") == HubDataset("owner/name")
    assert parse("hf://owner/name/config?split=test") == HubDataset("owner/name", "config", "test")
    assert parse("hf://datasets/owner/name?revision=abc") == HubDataset("owner/name", revision="abc")
    assert parse("hf:///data/folder") == HubDataset("/data/folder")
    for url in ("hf://", "hf://a/b/c/d", "hf://a//b"):
        with pytest.raises(UserError, match="no name of a data set"):
            parse(url)
    with pytest.raises(UserError, match="unknown option 'spilt'"):
        parse("hf://owner/name?spilt=test")


def test_mistakes_with_data_sets_are_the_users_to_mend(repository: Path, tmp_path: Path) -> None:
    for url, reason in (
        (f"hf://{repository}?split=dev", "dev"),
        (f"hf://{tmp_path}/missing", "missing"),
        ("hf://owner/name-that-is-not-here", "cannot be opened"),
    ):
        # Without the Hub nobody can say that the name is wrong.
        with pytest.raises((UserError, Fault) if "owner" in url else UserError, match=reason) as error:
            expand_sources([url])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="only files are read here"):
        expand_inputs([f"hf://{repository}"])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_written_records_are_read_by_others(tmp_path: Path, suffix: str) -> None:
    records = [
        Record("1", "a\u2028ß", "thinking\n", {"score": 0.5, "lost": float("nan"), "n": 1, "tags": ["a"]}),
        Record("2", "b", None, {"n": 2}),
        Record("3", "c\u0000", None, {}),
    ]
    path = tmp_path / f"x{suffix}"
    write_records(path, records)
    frame = pandas.read_json(path, lines=True, dtype=False)
    assert frame["text"].tolist() == [record.text for record in records]
    dataset = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset["text"] == [record.text for record in records]
    assert [meta.get("n") for meta in dataset["meta"]] == [1, 2, None]


def test_what_jobs_describe_themselves_in_is_not_read_as_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The settings of tools/augment.py have a field `text`."""
    (tmp_path / "a.jsonl").write_text('{"text": "a document"}\n')
    (tmp_path / "augment.json").write_text('{\n  "format_version": 2,\n  "text": "full"\n}\n')
    (tmp_path / "one.json").write_text('{"text": "another"}')
    assert [source.path.name for source in expand_sources([tmp_path]) if source.path] == ["a.jsonl", "one.json"]
    assert "augment.json" in capsys.readouterr().err


@pytest.mark.parametrize("split", [".", "..", "../secret", "/tmp", "a/b"])
def test_a_saved_data_set_does_not_lead_out_of_its_folder(tmp_path: Path, split: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/dataset_dict.json").write_text(json.dumps({"splits": [split]}))
    with pytest.raises(UserError, match="is not the name of a file or folder in it"):
        expand_sources([tmp_path / "set"])
    (tmp_path / "set/dataset_dict.json").unlink()
    (tmp_path / "set/dataset_info.json").write_text("{}")
    (tmp_path / "set/state.json").write_text(json.dumps({"_data_files": [{"filename": f"{split}/x.arrow"}]}))
    with pytest.raises(UserError, match="is not the name of a file or folder in it"):
        expand_sources([tmp_path / "set"])


@pytest.mark.parametrize("target", [".", "..", "../secret", "inner/back", "/"])
def test_a_saved_data_set_is_not_followed_through_links_back_or_out(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "saved"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.jsonl").write_text('{"text": "a secret"}\n')
    (folder / "inner" / "back").symlink_to("..")
    (folder / "train").symlink_to(target)
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match="its description as a saved data set is broken"):
        expand_sources([folder])


def test_a_file_of_a_saved_data_set_that_is_a_link_out_of_it_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a secret"]}).save_to_disk(tmp_path / "secret")
    shutil.copytree(tmp_path / "secret", tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert len(expand_sources([tmp_path / "saved"])) == 1
    file.unlink()
    file.symlink_to(tmp_path / "secret" / file.name)
    with pytest.raises(UserError, match="is a link out of it"):
        expand_sources([tmp_path / "saved"])
