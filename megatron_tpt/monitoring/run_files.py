"""All that the folder of a training run says about it, for a report."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_tpt.config.load import read_yaml
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.inspection import document_report
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.pack_manifest import PackManifest, is_packed
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packed_rows import row_report
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.monitoring.run_status import read_run
from megatron_tpt.monitoring.state import Status, last_objects, modified, read_fields
from megatron_tpt.provenance import STARTS
from megatron_tpt.training.checkpoint_files import finished_checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint."""

    step: int
    num_bytes: int
    written: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Part:
    """A piece of a training sample's text."""

    kind: str
    """document, thinking, learned (of a chat), or given (the rest of it)"""
    text: str


class RunFiles:
    """The files of a run, each read at most once. What is missing or damaged is empty."""

    def __init__(self, folder: Path, now: float) -> None:
        self.folder = folder
        self.now = now

    @cached_property
    def status(self) -> Status:
        """How far it is."""
        return read_run(self.folder, self.now)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return last_objects(path, path.stat().st_size) if path.exists() else []

    @cached_property
    def metric_names(self) -> list[str]:
        """All that metrics.jsonl has."""
        return list(dict.fromkeys(name for line in self.metrics for name in line))

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe."""
        try:
            return read_yaml(self.folder / "run.yaml")
        except (OSError, UserError):
            return {}

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """The starts of the run, oldest first (training/starts.py has the fields)."""
        path = self.folder / STARTS
        return last_objects(path, path.stat().st_size) if path.exists() else []

    def last(self, name: str) -> Any:
        """The newest value of a metric; None without one."""
        return next((line[name] for line in reversed(self.metrics) if line.get(name) is not None), None)

    def named(self, prefix: str) -> dict[str, float]:
        """The newest values of the metrics `prefix/NAME`, by NAME."""
        names = [name for name in self.metric_names if name.startswith(f"{prefix}/")]
        return {name.removeprefix(f"{prefix}/"): self.last(name) for name in names if self.last(name) is not None}

    def checkpoints(self) -> Iterator[Checkpoint]:
        """The finished checkpoints, oldest first."""
        for folder in finished_checkpoints(self.folder / "checkpoints"):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            yield Checkpoint(int(folder.name.removeprefix("step_")), size, modified(folder) or 0.0)

    def evaluations(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What tools/evaluate.py has written into folders of the run folder, by their names."""
        for path in sorted(self.folder.glob("*/results.json")):
            content = read_fields(path)
            if isinstance(content.get("models"), list):
                yield path.parent.name, content

    def indices(self) -> list[Path]:
        """The prefixes of the indices that it trains on, as far as they are there."""
        data = self.recipe.get("data") or {}
        blends = [data.get("train"), *((phase or {}).get("train") for phase in data.get("phases") or [])]
        given = [one["path"] if isinstance(one, dict) else str(one) for blend in blends for one in blend or []]
        return [path for path in map(Path, dict.fromkeys(given)) if Path(f"{path}.idx").exists()]

    def samples(self, most: int) -> Iterator[tuple[Path, list[Part]]]:
        """The first samples of each index, `most` in all, one index after another, with the prefixes of their indices.

        Raises UserError or OSError for an index that cannot be read.
        """
        prefixes = self.indices()[:most]
        for number in range(most):
            prefix = prefixes[number % len(prefixes)] if prefixes else None
            if prefix is not None and (parts := _sample(prefix, number // len(prefixes))):
                yield prefix, parts


def _sample(prefix: Path, number: int) -> list[Part]:
    """A document of an index, or an example of a packed one; empty beyond the last."""
    if is_packed([prefix]):
        packed = PackedIndex(prefix)
        if number >= len(packed):
            return []
        report = row_report(packed, number, Tokenizer(PackManifest.tokenizer_path(prefix)))
        return list(_chat_parts(report["examples"][0]))
    reader = IndexReader(prefix)
    if number >= reader.num_documents:
        return []
    tokenizer = Tokenizer(Path(Manifest.read(prefix).tokenizer.path))
    return [Part(part["kind"], part["text"]) for part in document_report(reader, number, tokenizer)["parts"]]


def _chat_parts(example: dict[str, Any]) -> Iterator[Part]:
    place = 0
    for part in example["learned"]:
        begin, end = part["characters"]
        yield Part("given", example["text"][place:begin])
        yield Part("learned", example["text"][begin:end])
        place = end
    yield Part("given", example["text"][place:])


def plain_json(value: Any) -> str:
    """A value of a recipe as one would write it in YAML on one line."""
    return value if isinstance(value, str) else json.dumps(value)
