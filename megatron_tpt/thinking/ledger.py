"""What is known of the finished blocks of a source, so that a run that resumes need not open any shard.

    OUTPUT/.work/ledger/00003-task-00001.jsonl      one line for every block that task 1 has finished of source number 3

The line is on the disk before the block's journal goes, so that a block that counts as done has one.
"""

import base64
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from megatron_tpt.files import append_line, appended_lines
from megatron_tpt.thinking.statistics import ThinkingStatistics


@dataclass(frozen=True)
class Entry:
    """A finished block."""

    block: str
    end: int
    """One past the number of its last row."""
    digests: numpy.ndarray
    """Digests of the ids in it, uint64; see `IdSet`."""
    statistics: ThinkingStatistics
    revision: int = 0
    """How often the block was rewritten, as when its rejects were retried: the highest one counts."""

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(
            {
                "block": self.block,
                "end": self.end,
                "ids": base64.b64encode(self.digests.tobytes()).decode(),
                "statistics": self.statistics.to_json(),
                "revision": self.revision,
            }
        )

    @classmethod
    def of(cls, *, block: str, end: int, ids: str, statistics: dict[str, Any], revision: int = 0) -> "Entry":
        """The entry in the fields of a line."""
        digests = numpy.frombuffer(base64.b64decode(ids), dtype=numpy.uint64)
        return cls(block, end, digests, ThinkingStatistics.from_json(statistics), revision)


class Ledger:
    """The finished blocks of one source, whichever task finished them."""

    def __init__(self, folder: Path, source: int, task: int) -> None:
        self.writer = f"task-{task:05d}"
        """The task that adds entries."""
        self._path = folder / f"{source:05d}-{self.writer}.jsonl"
        self.entries = _latest(read_entries(folder.glob(f"{source:05d}-task-*.jsonl")))

    def add(self, entry: Entry) -> None:
        """Note a finished block."""
        append_line(self._path, entry.to_json().encode())
        self.entries[entry.block] = entry


def read_entries(paths: Iterable[Path]) -> Iterator[Entry]:
    """The entries in ledger files."""
    for path in sorted(paths):
        yield from appended_lines(path, Entry.of)


def latest_entries(folder: Path) -> Iterator[Entry]:
    """What the ledgers in `folder` say of every finished block, once: one that was killed at its end has two lines."""
    paths = sorted(folder.glob("*-task-*.jsonl"))
    for _, of_source in itertools.groupby(paths, key=lambda path: path.name.partition("-")[0]):
        yield from _latest(read_entries(of_source)).values()


def _latest(entries: Iterable[Entry]) -> dict[str, Entry]:
    """The entries that count, by their blocks."""
    latest: dict[str, Entry] = {}
    for entry in entries:
        if entry.block not in latest or entry.revision >= latest[entry.block].revision:
            latest[entry.block] = entry
    return latest


def id_digest(record_id: str) -> int:
    """A 64-bit digest of an id."""
    return int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest(), "little")


class IdSet:
    """The ids that were seen, as 64-bit digests: 8 bytes each, and some more for the latest.

    Two ids share a digest with a probability of about n² / 2⁶⁵ among n of them: 3·10⁻⁸ for a million.
    """

    _MAX_RECENT = 1 << 16

    def __init__(self) -> None:
        # Sorted, each more than twice as long as the next: few to search, and each digest is merged few times.
        self._runs: list[numpy.ndarray] = []
        self._recent: set[int] = set()

    def __contains__(self, digest: int) -> bool:
        return digest in self._recent or any(_holds(run, digest) for run in self._runs)

    def add(self, digest: int) -> None:
        """Add one."""
        self._recent.add(digest)
        if len(self._recent) > self._MAX_RECENT:
            self.update(numpy.fromiter(self._recent, dtype=numpy.uint64, count=len(self._recent)))
            self._recent.clear()

    def update(self, digests: numpy.ndarray) -> None:
        """Add many, as uint64."""
        run = numpy.sort(digests)
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = numpy.sort(numpy.concatenate([self._runs.pop(), run]), kind="stable")  # merges what is sorted
        self._runs.append(run)


def _holds(run: numpy.ndarray, digest: int) -> bool:
    at = int(numpy.searchsorted(run, numpy.uint64(digest)))
    return at < len(run) and int(run[at]) == digest
