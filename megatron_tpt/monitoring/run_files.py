"""All that the folder of a training run says about it, for a report."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_tpt.indexing.inspection import document_report
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.pack_manifest import PackManifest, is_packed
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packed_rows import row_report
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.monitoring.run_status import read_recipe, read_run
from megatron_tpt.monitoring.state import Status, last_objects, modified, read_fields
from megatron_tpt.provenance import STARTS
from megatron_tpt.training.checkpoint_files import finished_checkpoints, step_number


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

    def __init__(self, folder: Path, name: str, now: float) -> None:
        """`name` is what a report calls the run, `now` the time in seconds since 1970."""
        self.folder = folder
        self.name = name
        self.now = now

    @cached_property
    def status(self) -> Status:
        """How far it is."""
        return read_run(self.folder, self.now)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that say of which step they are."""
        return [line for line in last_objects(self.folder / "metrics.jsonl") if _is_number(line.get("step"))]

    @cached_property
    def metric_names(self) -> list[str]:
        """All that metrics.jsonl has."""
        return list(dict.fromkeys(name for line in self.metrics for name in line))

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe."""
        return read_recipe(self.folder)

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """The starts of the run, oldest first (training/starts.py has the fields)."""
        return last_objects(self.folder / STARTS)

    @property
    def last_start(self) -> dict[str, Any]:
        """The newest of `starts`; empty without any."""
        return self.starts[-1] if self.starts else {}

    def values(self, name: str, x: str = "step") -> list[tuple[float, float]]:
        """A metric where it was finite, against steps, or against another metric such as tokens: where a line does not
        have that, as validations do not, its newest value until then. Ascending in x."""
        points, place = [], 0.0
        for line in self.metrics:
            place = line[x] if _is_number(line.get(x)) else place
            if _is_number(line.get(name)):
                points.append((place, line[name]))
        return sorted(points)

    def last(self, name: str) -> float | None:
        """The newest finite value of a metric; None without one."""
        return next((line[name] for line in reversed(self.metrics) if _is_number(line.get(name))), None)

    def named(self, prefix: str) -> dict[str, float]:
        """The newest values of the metrics `prefix/NAME`, by NAME."""
        last = {name: self.last(name) for name in self.metric_names if name.startswith(f"{prefix}/")}
        return {name.removeprefix(f"{prefix}/"): value for name, value in last.items() if value is not None}

    def checkpoints(self) -> Iterator[Checkpoint]:
        """The finished checkpoints, oldest first."""
        for folder in finished_checkpoints(self.folder / "checkpoints"):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            yield Checkpoint(step_number(folder), size, modified(folder) or 0.0)

    def indices(self) -> list[Path]:
        """The prefixes of the indices that it trains on, as far as they are there."""
        data = self.recipe.get("data") or {}
        blends = [data.get("train"), *((phase or {}).get("train") for phase in data.get("phases") or [])]
        given = [one["path"] if isinstance(one, dict) else str(one) for blend in blends for one in blend or []]
        return [path for path in map(Path, dict.fromkeys(given)) if Path(f"{path}.idx").exists()]

    def samples(self, most: int) -> Iterator[tuple[Path, list[Part]]]:
        """The first samples of each index, `most` in all, with the prefixes of their indices.

        Raises UserError or OSError for an index that cannot be read.
        """
        prefixes = self.indices()[:most]
        for place, prefix in enumerate(prefixes):
            for parts in _samples(prefix, len(range(place, most, len(prefixes)))):
                yield prefix, parts


def evaluations(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What tools/evaluate.py has written into folders of a folder, with these."""
    for path in sorted(folder.glob("*/results.json")):
        content = read_fields(path)
        if isinstance(content.get("models"), list):
            yield path.parent, content


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _samples(prefix: Path, most: int) -> Iterator[list[Part]]:
    """The first documents of an index, or the first examples of the first rows of a packed one."""
    if is_packed([prefix]):
        packed = PackedIndex(prefix)
        tokenizer = Tokenizer(PackManifest.tokenizer_path(prefix))
        for number in range(min(most, len(packed))):
            parts = _chat_parts(row_report(packed, number, tokenizer)["examples"][0])
            yield [part for part in parts if part.text]
        return
    reader = IndexReader(prefix)
    tokenizer = Tokenizer(Path(Manifest.read(prefix).tokenizer.path))
    for number in range(min(most, reader.num_documents)):
        yield [Part(part["kind"], part["text"]) for part in document_report(reader, number, tokenizer)["parts"]]


def _chat_parts(example: dict[str, Any]) -> Iterator[Part]:
    text, place = example["text"], 0
    for begin, end in (part["characters"] for part in example["learned"]):
        yield Part("given", text[place:begin])
        yield Part("learned", text[begin:end])
        place = end
    yield Part("given", text[place:])
