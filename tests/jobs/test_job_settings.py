"""What ties a job to its output: differences are named, files may be added, and output and input do not overlap."""

from pathlib import Path
from typing import Any

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.files import file_fingerprint
from megatron_tpt.jobs.settings import (
    EntryChanges,
    added_names,
    check_settings,
    describe_changes,
    describe_inputs,
    in_job_order,
    read_settings,
    require_apart,
    write_settings,
)
from megatron_tpt.records import Source


def sources(folder: Path, *names: str, size: int = 10) -> list[Source]:
    """Sources that are made where they are not there."""
    for name in names:
        if not (folder / name).exists():
            (folder / name).write_bytes((name.encode() * size)[:size])
    return [Source(name, size, folder / name) for name in names]


def settings_of(path: Path, found: list[Source], **others: Any) -> dict[str, Any]:
    return {"input": describe_inputs(path, in_job_order(path, found)), **others}


def names(path: Path) -> list[str]:
    settings = read_settings(path)
    assert settings is not None
    return [entry["name"] for entry in settings["input"]]


def test_every_setting_that_differs_is_named_from_what_to_what() -> None:
    before = {"ngram": 13, "filters": {"shortest": 1, "longest": None}, "columns": ["a"], "old": 1}
    now = {"ngram": 8, "filters": {"shortest": 2, "longest": None}, "columns": ["a", "ö"], "new": "x"}
    assert list(describe_changes(before, now)) == [
        "ngram was 13, now 8",
        "filters.shortest was 1, now 2",
        'columns was ["a"], now ["a", "ö"]',
        'new was null, now "x"',
        "old was 1, now null",
    ]


def test_of_long_values_the_place_where_they_differ_is_shown() -> None:
    text = "word " * 100
    (change,) = describe_changes({"prompt": text + "before" + text}, {"prompt": text + "after" + text})
    assert "before" in change and "after" in change and len(change) < 200


def test_files_noted_by_name_are_named() -> None:
    before = {"model_files": {"config.json": "1", "a.safetensors": "2"}}
    now = {"model_files": {"config.json": "3", "b.safetensors": "2"}}
    (change,) = describe_changes(before, now)
    assert change == "model_files: 1 renamed (a.safetensors to b.safetensors), 1 changed (config.json)"


def test_how_lists_of_entries_differ() -> None:
    def changes(before: str, now: str) -> EntryChanges:
        return EntryChanges(*([{"name": name, "fingerprint": name.lower()} for name in each] for each in (before, now)))

    assert changes("abc", "abc").describe() == "" and not changes("abc", "abc").only_added
    assert changes("ab", "xaybz").describe() == "3 added (x, y, z)" and changes("ab", "xaybz").only_added
    assert changes("ab", "ba").describe() == "the order was a, b, now b, a"
    assert not changes("ab", "bax").only_added
    assert changes("abcde", "e").describe() == "4 removed (a, b, c and 1 more)"
    assert changes("ab", "aB").describe() == "1 renamed (b to B)" and not changes("ab", "aB").only_added


def test_added_files_come_after_those_that_the_job_has(tmp_path: Path) -> None:
    path = tmp_path / "out" / "job.json"
    write_settings(path, settings_of(path, sources(tmp_path, "b", "d"), seed=1))
    for found, added, order in [
        (("a", "b", "c", "d"), ["a", "c"], ["b", "d", "a", "c"]),
        (("a", "b", "c", "d"), [], ["b", "d", "a", "c"]),
        (("0", "a", "b", "c", "d", "e"), ["0", "e"], ["b", "d", "a", "c", "0", "e"]),
    ]:
        settings = settings_of(path, sources(tmp_path, *found), seed=1)
        check_settings(path, settings)
        assert added_names(path, settings) == added
        write_settings(path, settings)
        assert names(path) == order
        assert [source.name for source in in_job_order(path, sources(tmp_path, *found))] == order


def test_files_are_not_added_to_a_job_that_differs_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "out" / "job.json"
    write_settings(path, settings_of(path, sources(tmp_path, "a", "b"), seed=1))
    for found, seed, message in [
        (("a", "b", "c"), 2, r"\(seed was 1, now 2\)"),  # the new file is no fault
        (("a", "c"), 1, r"\(input: 1 added \(c\), 1 removed \(b\)\)"),
        (("b", "a", "c"), 1, r"\(input: 1 added \(c\)\)|order"),
    ]:
        settings = settings_of(path, sources(tmp_path, *found), seed=seed)
        with pytest.raises(UserError, match=message):
            check_settings(path, settings)
    (tmp_path / "a").write_text("changed")
    with pytest.raises(UserError, match=r"input: 1 added \(c\), 1 changed \(a\)"):
        check_settings(path, settings_of(path, sources(tmp_path, "a", "b", "c"), seed=1))
    assert names(path) == ["a", "b"]


def test_files_are_added_to_jobs_of_earlier_versions_however_many_they_are(tmp_path: Path) -> None:
    path = tmp_path / "out" / "job.json"
    old = sources(tmp_path, "a", "b", size=5 << 20)  # compared in fewer places, the more files there are
    write_settings(path, {"input": [{"name": s.name, "fingerprint": file_fingerprint(s.path, 32)} for s in old]})
    many = [f"new{i:02d}" for i in range(40)]
    settings = settings_of(path, [*old, *sources(tmp_path, *many)])
    check_settings(path, settings)
    assert added_names(path, settings) == many
    write_settings(path, settings)
    check_settings(path, settings_of(path, [*old, *sources(tmp_path, *many)]))


def refuses(output: Path, *inputs: Path | str, is_prefix: bool = False) -> bool:
    files = [path for each in map(Path, inputs) if each.exists() for path in each.rglob("*.jsonl")]
    files += [path for each in map(Path, inputs) if each.is_file() for path in [each]]
    try:
        require_apart(output, inputs, files, is_prefix=is_prefix)
    except UserError:
        return True
    return False


def test_an_output_inside_the_input_is_refused_through_links_and_patterns(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    (data / "deep").mkdir(parents=True)
    other.mkdir()
    (data / "a.jsonl").touch()
    (other / "to_data").symlink_to(data)
    (data / "deep" / "to_other").symlink_to(other)
    (data / "up").symlink_to(data)
    for output in (data, data / "x", data / "deep" / "x" / "y", data / ".." / "data" / "x", other / "to_data" / "x"):
        assert refuses(output, data)
        assert refuses(output, tmp_path / "none", data)
        assert refuses(output / "x", data, is_prefix=True)
        assert refuses(output, f"hf://{data}?split=train")
    assert refuses(other / "x", data)  # a link leads there
    assert not refuses(tmp_path / "x", data)
    assert not refuses(tmp_path / "data2", data)  # a name that begins alike
    for pattern in ("*", "**", "**/*", "**/*.jsonl.zst", "x/*.zst", "[x-z]", "**/*.json"):
        assert refuses(data / "x", f"{data}/{pattern}"), pattern
    for pattern in ("*.jsonl", "**/*.jsonl", "y*", "*/deep/*"):
        assert not refuses(data / "x", f"{data}/{pattern}"), pattern
    assert not refuses(data / "x", f"{data}/*.jsonl", is_prefix=True)
    assert refuses(data / "x", f"{data}/*.json", is_prefix=True)


def test_input_inside_the_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "rejects").mkdir(parents=True)
    (out / "rejects" / "a.jsonl").touch()
    (tmp_path / "index.json").touch()
    (tmp_path / "link.jsonl").symlink_to(out / "rejects" / "a.jsonl")
    for given in (out / "rejects", out / "rejects" / "a.jsonl", tmp_path / "link.jsonl"):
        assert refuses(out, given)
        assert not refuses(tmp_path / "other", given)
        assert not refuses(out / "x", given, is_prefix=True)  # next to it, under another name
    assert refuses(tmp_path / "index", tmp_path / "index.json", is_prefix=True)
