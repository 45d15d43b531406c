"""Runs of tools/augment.py for the tests: options that suit tiny models, and what a run has left behind."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zstandard
from unruly_server import MODEL, UnrulyServer

from megatron_tpt.records import Record, read_records
from megatron_tpt.thinking.filter_options import FilterOptions
from megatron_tpt.thinking.options import AugmentOptions

TOOL = Path(__file__).parents[2] / "tools" / "augment.py"
# A model of random weights writes what no filter would let pass.
NO_FILTERS = FilterOptions(
    min_words=0,
    max_repeated_share=1,
    loop_words=0,
    max_foreign_share=1,
    max_refusal_words=0,
    max_copied_share=1,
)


def options_for(documents: Path, model: str, output: Path, **changes: Any) -> AugmentOptions:
    settings: dict[str, Any] = {
        "input": [str(documents)],
        "output": output,
        "model": model,
        "temperature": 1.0,
        "max_new_tokens": 40,
        "max_document_tokens": 50,
        "rows_per_shard": 5,
        "on_bad_record": "skip",
        "filters": NO_FILTERS,
    }
    return AugmentOptions(**settings | changes)


def job(folder: Path, server: UnrulyServer, texts: list[str], **changes: Any) -> AugmentOptions:
    """A job over `texts` on `server`, whose prompts are the texts alone."""
    write_documents(folder / "in.jsonl", ({"text": text} for text in texts))
    (folder / "bare.txt").write_text("{document}")
    settings = {"engine": "endpoint", "api": "chat", "endpoints": [server.url], "prompt": str(folder / "bare.txt")}
    return options_for(folder / "in.jsonl", MODEL, folder / "out", **settings | changes)


def good_texts(number: int) -> list[str]:
    """Documents that the server answers at once."""
    return [f"ok 0 {i}" for i in range(number)]


def command(options: AugmentOptions, *more: str) -> list[str]:
    """The command line of `options_for`, with what it was given in `more`."""
    filters = [word for name, value in vars(options.filters).items() if not isinstance(value, list)
               for word in (f"--filters.{name.replace('_', '-')}", str(value))]  # fmt: skip
    return [
        *(sys.executable, str(TOOL), "--input", *options.input),
        *("--output", str(options.output), "--model", options.model),
        *("--temperature", str(options.temperature), "--max-new-tokens", str(options.max_new_tokens)),
        *("--max-document-tokens", str(options.max_document_tokens)),
        *("--rows-per-shard", str(options.rows_per_shard), "--on-bad-record", options.on_bad_record),
        *(*filters, *more),
    ]


def run_tool(options: AugmentOptions, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(options, *more), capture_output=True, text=True)


def shards(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("part-*"))}


def records(output: Path) -> list[Record]:
    paths = sorted(output.glob("part-*"))
    return list(read_records(paths)) if paths else []


def rejects(output: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for path in sorted((output / "rejects").glob("part-*")):
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as unpacked:
            lines += map(json.loads, unpacked.read().splitlines())
    return lines


def write_documents(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
