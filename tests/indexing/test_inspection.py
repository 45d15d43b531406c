"""tools/inspect_index.py shows what an index holds, ours or another's."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.comparison import Difference, first_difference
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.inspection import inspect_index, length_histogram
from megatron_tpt.indexing.inspection_options import InspectOptions
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.pack_manifest import PackManifest
from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.writer import HEADER, IndexWriter

TOOL = Path(__file__).parents[2] / "tools" / "inspect_index.py"


@pytest.fixture(scope="module")
def prefix(documents: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("index") / "train"
    index(IndexOptions([documents], tokenizer_dir, prefix))
    return prefix


def test_counts_and_verification_are_shown(prefix: Path) -> None:
    result = subprocess.run([sys.executable, TOOL, prefix, "--verify"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for expected in ("2,000", "in 667 documents", "uint16", "verified: sizes"):
        assert expected in result.stdout


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_a_file_of_an_index_and_other_files_are_no_prefix(prefix: Path, documents: Path, suffix: str) -> None:
    with pytest.raises(UserError, match=rf"is a file of an index; give the prefix of its files, {prefix}$"):
        inspect_index(InspectOptions(Path(f"{prefix}{suffix}")))
    with pytest.raises(UserError, match=r"is a file, not an index; make one of it with tools/index\.py"):
        Manifest.read(documents)


def places(value: Any, inside: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in some JSON."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*inside, key)
        yield from places(child, (*inside, key))


@pytest.mark.parametrize("wrong", [[[[]]], {"a": 1}, "x", None, -7, 1e300], ids=repr)
@pytest.mark.parametrize("kind", ["index", "packed"])
def test_a_manifest_with_a_value_of_another_kind_is_refused_or_shown(
    kind: str, wrong: Any, documents: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "made"
    if kind == "index":
        index(IndexOptions([documents], tokenizer_dir, prefix))
        path = Manifest.path(prefix)
    else:
        examples = tmp_path / "examples.jsonl"
        examples.write_text(json.dumps({"prompt": "one", "response": "two"}) + "\n")
        columns = {"prompt_column": "prompt", "response_column": "response"}
        pack_sft(PackOptions([examples], tokenizer_dir, prefix, sequence_length=50, **columns))
        path = PackManifest.path(prefix)
    good = path.read_bytes()
    refused = set()
    for place in places(json.loads(good)):
        content = parent = json.loads(good)
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = wrong
        path.write_text(json.dumps(content))
        try:
            inspect_index(InspectOptions(prefix))
        except UserError:
            refused.add(place)
    assert {("counts",), ("sources", 0), ("tokenizer",), ("checksums",)} <= refused


def test_a_document_is_decoded_with_its_thinking_apart(
    prefix: Path, documents: Path, capsys: pytest.CaptureFixture
) -> None:
    from megatron_tpt.records import read_records

    record = next(read_records([documents], limit=1))
    assert record.thinking is not None
    inspect_index(InspectOptions(prefix, document=0))
    shown = capsys.readouterr().out
    assert re.search(r"--- document, \d+ tokens ---\n" + re.escape(f"{record.text}\n--- thinking, "), shown)
    assert f" tokens ---\n<think>\n{record.thinking.strip()}\n</think>\n--- document, 1 tokens ---\n" in shown
    inspect_index(InspectOptions(prefix, document=0, json=True))
    report = json.loads(capsys.readouterr().out)
    assert [part["kind"] for part in report["parts"]] == ["document", "thinking", "document"]
    assert report["parts"][0]["text"] == record.text
    tokens = [token for part in report["parts"] for token in part["tokens"]]
    assert tokens == IndexReader(prefix).document(0).tolist()
    assert report["thinking_tokens"] == len(report["parts"][1]["tokens"])
    for number in (2000, -1):
        with pytest.raises(UserError, match=f"no document {number}; they are 0 to 1999"):
            inspect_index(InspectOptions(prefix, document=number))


def test_everything_is_there_for_programs_too(prefix: Path, capsys: pytest.CaptureFixture) -> None:
    assert inspect_index(InspectOptions(prefix, verify=True, json=True))
    report = json.loads(capsys.readouterr().out)
    assert report["documents"] == report["sequences"] == 2000
    assert report["tokens"] == report["manifest"]["counts"]["tokens"]
    assert sum(row["documents"] for row in report["tokens_per_document"]["histogram"]) == 2000
    assert "checksums" in report["verified"]


def copy(prefix: Path, target: Path) -> Path:
    for kind in ("bin", "idx", "json"):
        shutil.copyfile(f"{prefix}.{kind}", f"{target}.{kind}")
    return target


def overwrite(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


OFFSETS = HEADER.size + 4 * 2000
BOUNDS = OFFSETS + 8 * 2000


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (HEADER.size + 4 * 7, b"\xff\xff\xff\xff", None),
        (OFFSETS + 8 * 5, b"\x01", f"byte {OFFSETS + 8 * 5}: the offset of sequence 5"),
        (OFFSETS + 8 * 1999, bytes(8), f"byte {OFFSETS + 8 * 1999}: the offset of sequence 1999"),
        (BOUNDS, b"\x01", f"byte {BOUNDS}: the first document does not begin"),
        (BOUNDS + 8 * 30, bytes(8), f"byte {BOUNDS + 8 * 30}: document 29 ends before it begins"),
        (BOUNDS + 8 * 2000, b"\xd1", f"byte {BOUNDS + 8 * 2000}: the last document does not end"),
    ],
)
def test_damage_of_the_structure_is_named_by_its_byte(
    offset: int, data: bytes, message: str | None, prefix: Path, tmp_path: Path
) -> None:
    damaged = copy(prefix, tmp_path / "damaged")
    overwrite(f"{damaged}.idx", offset, data)
    with pytest.raises(UserError, match=f"idx: damaged at {message}" if message else "damaged"):
        inspect_index(InspectOptions(damaged))


def test_damage_of_the_tokens_is_named_by_its_byte(prefix: Path, tmp_path: Path) -> None:
    reader = IndexReader(prefix)
    end = 2 * int(reader.document_lengths()[:4].sum())
    damages = {"unknown": (40, b"\xff\xff", "byte 40: token 65535 is none"), "quiet": (40, None, "its bytes changed")}
    damages["eos"] = (end - 2, b"\x05\x00", f"byte {end - 2}: document 3 does not end with")
    for name, (offset, data, message) in damages.items():
        damaged = copy(prefix, tmp_path / name)
        overwrite(f"{damaged}.bin", offset, data or int(reader.tokens[20] ^ 1).to_bytes(2, "little"))
        with pytest.raises(UserError, match=rf"{name}\.bin: damaged.*{message}"):
            inspect_index(InspectOptions(damaged, verify=True))
    short = copy(prefix, tmp_path / "short")
    os.truncate(f"{short}.bin", 1000)
    with pytest.raises(UserError, match=r"short\.bin"):
        inspect_index(InspectOptions(short, verify=True))


def write(prefix: Path, *documents: list[int]) -> Path:
    with IndexWriter(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), 100) as writer:
        for document in documents:
            writer.add_document(numpy.array(document))
    return prefix


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([[1, 2, 3], [4, 5], [6]], None),
        ([[1, 2, 3], [4, 9], [6]], Difference(1, 1, "document 1, token 1: 5 here, 9 there")),
        ([[1, 2, 3], [4, 5, 6]], Difference(1, 2, "document 1 has 2 tokens here, 3 there; the first 2 agree")),
        ([[1, 2, 3], [7, 5, 6]], Difference(1, 0, "document 1, token 0: 4 here, 7 there")),
        ([[1, 2], [3, 4, 5], [6]], Difference(0, 2, "document 0 has 3 tokens here, 2 there; the first 2 agree")),
        ([[1, 2, 3], [4, 5]], Difference(2, None, "3 documents here, 2 there; the first 2 agree")),
    ],
)
def test_the_first_difference_is_found(other: list[list[int]], expected: Difference | None, tmp_path: Path) -> None:
    ours, theirs = write(tmp_path / "ours", [1, 2, 3], [4, 5], [6]), write(tmp_path / "theirs", *other)
    assert first_difference(ours, theirs) == expected


def test_a_comparison_ends_as_cmp_does(prefix: Path, tmp_path: Path) -> None:
    same, other = copy(prefix, tmp_path / "same"), copy(prefix, tmp_path / "other")
    overwrite(f"{other}.bin", 0, b"\x07\x00")
    for target, code, shown in ((same, 0, "identical\n"), (other, 1, "document 0, token 0: ")):
        result = subprocess.run([sys.executable, TOOL, prefix, "--compare", target], capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        assert result.stdout.startswith(shown)


def test_an_index_without_manifest_is_shown_and_needs_a_tokenizer_to_decode(
    prefix: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for kind in ("bin", "idx"):
        (tmp_path / f"foreign.{kind}").write_bytes(Path(f"{prefix}.{kind}").read_bytes())
    foreign = tmp_path / "foreign"
    inspect_index(InspectOptions(foreign, verify=True))
    assert "not made by this program" in capsys.readouterr().out
    with pytest.raises(UserError, match="give --tokenizer"):
        inspect_index(InspectOptions(foreign, document=1))
    inspect_index(InspectOptions(foreign, document=1, tokenizer=tokenizer_dir))
    assert "<|endoftext|>" in capsys.readouterr().out


def test_another_tokenizer_is_refused(prefix: Path, word_tokenizer_dir: Path) -> None:
    with pytest.raises(UserError, match="another tokenizer"):
        inspect_index(InspectOptions(prefix, document=1, tokenizer=word_tokenizer_dir))


def test_lengths_are_counted_between_powers_of_two() -> None:
    lengths = numpy.array([2, 3, 4, 7, 8, 31])
    assert length_histogram(lengths) == [(2, 3, 2), (4, 7, 2), (8, 15, 1), (16, 31, 1)]
    assert length_histogram(numpy.array([0, 1])) == [(0, 0, 1), (1, 1, 1)]
