"""Corpora for the tests, and what a run left."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zstandard

from megatron_tpt.records import read_records

_WORDS = [
    a + b for a in ("ba", "ke", "li", "mo", "nu", "ra") for b in ("dan", "fel", "gor", "hit", "jam", "ker", "lop")
]


def sentence(seed: int, num_words: int = 30) -> str:
    """A text of made-up words: another one for every seed."""
    return " ".join(random.Random(seed).choices(_WORDS, k=num_words)).capitalize() + "."


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """JSONL of objects, or of strings as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def kept_texts(output: Path) -> list[str]:
    """The texts of a run's clean documents, in order."""
    return [record.text for record in read_records(sorted(output.glob("part-*")))]


def rejects(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's rejects, in order."""
    lines: list[dict[str, Any]] = []
    for path in sorted((output / "rejects").glob("part-*")):
        unpacked = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
        lines += map(json.loads, unpacked.splitlines())
    return lines


def output_bytes(output: Path) -> dict[str, bytes]:
    """Every visible file that a run left."""
    files = {path.relative_to(output): path for path in sorted(output.rglob("*")) if path.is_file()}
    is_hidden = {name: any(part.startswith(".") for part in name.parts) for name in files}
    return {str(name): path.read_bytes() for name, path in files.items() if not is_hidden[name]}
