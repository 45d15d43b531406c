"""Recipes, studies and descriptions as an attacker writes them: each ends with one message, in bounded time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron_tpt import json_data
from megatron_tpt.config import yaml_file
from megatron_tpt.config.yaml_file import MAX_BYTES, load_yaml, read_yaml_file
from megatron_tpt.errors import UserError
from megatron_tpt.generation import load_model_config, load_tokenizer
from megatron_tpt.indexing.comparison import first_difference
from megatron_tpt.indexing.inspection import inspect_index
from megatron_tpt.indexing.inspection_options import InspectOptions
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.indexing.writer import HEADER, MAGIC, VERSION
from megatron_tpt.jobs.settings import read_settings
from megatron_tpt.json_data import read_object
from megatron_tpt.records import expand_sources
from megatron_tpt.studies.results import read_points
from megatron_tpt.studies.study import load_study
from megatron_tpt.training.checkpoint_files import damage_of_files
from megatron_tpt.training.model_files import History


def aliases(values: str) -> str:
    """Nine anchors, each a collection of nine of the one before: 9^9 values."""
    lines = [f"a0: &a0 {values}"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return "\n".join([*lines, "model: {num_layers: *a8}\n"])


def merges() -> str:
    """Mappings that take each other in twice over."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{p: {{<<: *a{n - 1}}}, q: {{<<: *a{n - 1}}}, r: *a{n - 1}}}" for n in range(1, 30)]
    return "\n".join(lines) + "\n"


HOSTILE_YAML = {
    "aliases of lists": aliases("[x, x, x, x, x, x, x, x, x]"),
    "aliases of mappings": aliases("{a: 1, b: 2, c: 3, d: 4, e: 5, f: 6, g: 7, h: 8, i: 9}"),
    "merges": merges(),
    "an alias within itself": "a: &a [*a, *a]\n",
    "a mapping within itself": "a: &a {b: *a}\n",
    "a deep list": "a: " + "[" * 150 + "]" * 150 + "\n",
    "a very deep list": "a: " + "[" * 5000 + "]" * 5000 + "\n",
    "a list deeper than any stack": "[" * 1_000_000,
    "deep mappings": "".join(f"{' ' * n}a:\n" for n in range(300)),
    "a call": "model: !!python/object/apply:os.system ['true']\n",
    "an object": "model: !!python/object/new:object {}\n",
    "a module": "model: !!python/module:os\n",
    "a name": "model: !!python/name:os.system\n",
    "an unknown tag": "model: !evil {a: 1}\n",
    "a list as key": "? [a, b]\n: 1\n",
    "control characters": 'a: "\x1b[31m"\n',
    "two documents": "a: 1\n---\nb: 2\n",
}


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_a_hostile_recipe_is_refused(tmp_path: Path, name: str, is_large: bool) -> None:
    """Also a large one, which has another loader."""
    path = tmp_path / "recipe.yaml"
    path.write_text("#\n" * (1 << 18 if is_large else 0) + HOSTILE_YAML[name])
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        read_yaml_file(path)


def test_a_recipe_has_a_largest_number_of_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_file, "MAX_VALUES", 1000)
    path = tmp_path / "recipe.yaml"
    path.write_text("a: [" + "1," * 999 + "]\n")
    with pytest.raises(UserError, match=r"recipe\.yaml:1: more than 1,000 values, aliases included"):
        read_yaml_file(path)


def test_a_recipe_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UserError, match="bytes, and at most"):
        load_yaml(path)


def test_aliases_and_merges_of_a_usual_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: &base {a: 1, b: [1, 2]}\none: {<<: *base, c: 3}\ntwo: [*base, *base]\n")
    content = read_yaml_file(path).content
    assert content["one"] == {"a": 1, "b": [1, 2], "c": 3} and content["two"] == [content["base"]] * 2


@pytest.mark.parametrize("name", ["aliases of lists", "a deep list", "a call"])
def test_a_foreign_checkpoint_has_a_recipe_within_bounds(tmp_path: Path, name: str) -> None:
    (tmp_path / "recipe.yaml").write_text(HOSTILE_YAML[name])
    with pytest.raises(UserError):
        History.read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *map(HOSTILE_YAML.__getitem__, ["aliases of lists", "a very deep list", "a call", "control characters"]),
        "title: 1\ncommand: 5\nseeds: abc\n",
        "title: x\nseeds: [[1]]\ncommand: ['{seed}{output}']\n",
    ],
)
def test_a_hostile_study_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(content)
    with pytest.raises(UserError):
        load_study(path)


def in_folder(name: str, read: Callable[[Path], Any]) -> Callable[[Path, str], Any]:
    def check(folder: Path, text: str) -> Any:
        (folder / name).write_text(text)
        return read(folder)

    return check


def read_tokenizer(folder: Path) -> Any:
    return Tokenizer(folder)


def read_saved(folder: Path) -> Any:
    (folder / "dataset_info.json").write_text("{}")
    return expand_sources([folder])


READERS = {
    "manifest": in_folder("index.json", lambda folder: Manifest.read(folder / "index")),
    "settings": in_folder("job.json", lambda folder: read_settings(folder / "job.json")),
    "history": in_folder("history.json", History.read),
    "model": in_folder("config.json", lambda folder: read_object(folder / "config.json")),
    "tokenizer": in_folder("tokenizer.json", read_tokenizer),
    "saved data set": in_folder("state.json", read_saved),
    "results": in_folder("results.json", lambda folder: read_points(folder / "results.json")),
}
HOSTILE_JSON = {
    "deep": "[" * 990 + "]" * 990,
    "very deep": '{"a":' * 100_000,
    "digits": '{"a": ' + "9" * 5000 + "}",
    "list": "[1]",
    "number": "1e999",
    "not UTF-8": '"\udcff"',
    "other fields": '{"format_version": 1, "counts": 7, "version": [], "points": 3, "_data_files": {"a": 1}, "x": 2}',
}


@pytest.mark.parametrize("content", HOSTILE_JSON)
@pytest.mark.parametrize("reader", READERS)
def test_hostile_descriptions_are_refused(tmp_path: Path, reader: str, content: str) -> None:
    if (reader, content) in [("settings", "other fields"), ("model", "other fields")]:
        return  # that these have other fields is for those who look at the fields
    text = HOSTILE_JSON[content].encode("utf-8", "surrogateescape").decode("latin-1")
    with pytest.raises(UserError):
        READERS[reader](tmp_path, text)


def test_descriptions_have_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_data, "MAX_FILE_BYTES", 100)
    for reader in READERS.values():
        with pytest.raises(UserError, match=r"1,002 bytes are too many|broken"):
            reader(tmp_path, json.dumps("x" * 1000))


@pytest.mark.parametrize(
    "files",
    [[], {"a": 1}, {"a": ["x"]}, {"/dev/zero": [0, "x"]}, {"../other": [1, "x"]}, {"a/../../b": [1, "x"]}, "deep"],
)
def test_checksums_are_those_of_files_in_the_folder(tmp_path: Path, files: Any) -> None:
    text = "[" * 5000 if files == "deep" else json.dumps(files)
    (tmp_path / "checksums.json").write_text(text)
    (problem,) = damage_of_files(tmp_path)
    assert "checksums.json cannot be read" in problem


@pytest.mark.parametrize("text", ["[" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, "[1]", '{"model_type": [1]}', "x"])
def test_a_foreign_models_configuration_and_tokenizer_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "tokenizer.json").write_text(text)
    for load in (load_model_config, load_tokenizer):
        with pytest.raises(UserError, match=r"cannot be loaded|tokenizer\.json: not a readable tokenizer"):
            load(str(tmp_path))


def write_index(
    prefix: Path, counts: tuple[int, int], lengths: list[int], offsets: list[int], bounds: list[int]
) -> Path:
    arrays = [numpy.array(lengths, "<i4"), numpy.array(offsets, "<i8"), numpy.array(bounds, "<i8")]
    header = HEADER.pack(MAGIC, VERSION, 4, *counts)
    Path(f"{prefix}.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    Path(f"{prefix}.bin").write_bytes(bytes(8))
    return prefix


@pytest.mark.parametrize(
    ("counts", "lengths", "offsets", "bounds"),
    [
        ((2**60, 2**60), [2], [0], [0, 1]),
        ((2**64 - 1, 2**64 - 1), [2], [0], [0, 1]),
        ((1, 2), [2], [0], [0, 2**50]),
        ((1, 2), [2], [0], [0, -1]),
        ((1, 2), [2], [-8], [0, 1]),
        ((1, 2), [2], [2**60], [0, 1]),
        ((2, 2), [5, -3], [0, 20], [0, 2]),
    ],
)
def test_an_index_with_counts_and_places_that_cannot_be_is_damaged(
    tmp_path: Path, counts: tuple[int, int], lengths: list[int], offsets: list[int], bounds: list[int]
) -> None:
    good = write_index(tmp_path / "good", (1, 2), [2], [0], [0, 1])
    assert first_difference(good, good) is None
    evil = write_index(tmp_path / "evil", counts, lengths, offsets, bounds)
    for call in (lambda: first_difference(good, evil), lambda: inspect_index(InspectOptions(evil))):
        with pytest.raises(UserError, match=r"evil\.idx: damaged"):
            call()
