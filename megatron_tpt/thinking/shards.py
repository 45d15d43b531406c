"""The output folder of an augment run, block by block."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import zstandard

from megatron_tpt.errors import UserError
from megatron_tpt.jobs.folder import WORK, JobFolder
from megatron_tpt.records import REJECTS, Record, json_lines, read_records, write_records
from megatron_tpt.records.inventory import Inventory
from megatron_tpt.thinking.journal import Journal, holds_answers, name_of, path_of
from megatron_tpt.thinking.ledger import Entry, Ledger, id_digest, latest_entries
from megatron_tpt.thinking.rows import count_rejects
from megatron_tpt.thinking.statistics import ThinkingStatistics

logger = logging.getLogger(__name__)

SETTINGS_NAME = "augment.json"
_SUFFIX = ".jsonl.zst"


def block_name(source: int, block: int) -> str:
    """The name of a block in files: `part-00003-00017`."""
    return f"part-{source:05d}-{block:05d}"


def _files_of(name: str) -> tuple[str, str]:
    """The files that a block becomes, relative to the output folder."""
    return f"{name}{_SUFFIX}", f"{REJECTS}/{name}{_SUFFIX}"


class Output(JobFolder):
    """Which blocks are done, and how one is written out."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, SETTINGS_NAME)
        self.rejects = folder / REJECTS
        self.journals = folder / WORK / "journal"
        self.ledgers = folder / WORK / "ledger"
        self.retries = folder / WORK / "retries"
        self.refilter_mark = folder / WORK / "refilter.json"
        self._done = {
            path.name.removesuffix(_SUFFIX)
            for place in (self.folder, self.rejects)
            for path in place.glob(f"part-*{_SUFFIX}")
        } - {name_of(path) for path in self.journals.glob("part-*")}
        self._inventory = Inventory(folder)
        self._open: set[Journal] = set()
        self._leftovers = [
            path for place in (self.folder, self.rejects) for path in place.glob(f".tmp-*-part-*{_SUFFIX}")
        ]

    def is_done(self, name: str) -> bool:
        """Whether the block was finished when this object was made."""
        return name in self._done

    def set_aside_damaged(self, name: str) -> bool:
        """Whether files of a block that is not in progress are not as they were recorded: then they are hidden, and the
        block is no longer done."""
        if self._difference(name) is None or path_of(self.journals, name).exists():
            return False
        self._inventory = Inventory(self.folder)  # another process may have rewritten the block
        if (difference := self._difference(name)) is None:
            return False
        for path in map(self.folder.joinpath, _files_of(name)):
            if path.exists():
                path.replace(path.with_name(f".damaged-{path.name}"))
        self._done.discard(name)
        logger.warning(f"{difference}; this block's files are set aside, and it is repeated")
        return True

    def _difference(self, name: str) -> str | None:
        """Which file of a block is not as it was recorded, and how; None where all are, or nothing was recorded."""
        differences = {file: self._inventory.difference(file) for file in _files_of(name)}
        return next((f"{self.folder / file}: {what}" for file, what in differences.items() if what), None)

    def journal(self, name: str) -> Journal | None:
        """The journal of a block that was not done; None when another process has finished it since."""
        journal = Journal(path_of(self.journals, name))
        if journal.is_new and any((place / f"{name}{_SUFFIX}").exists() for place in (self.folder, self.rejects)):
            journal.remove()
            return None
        self._open.add(journal)
        return journal

    def close(self) -> None:
        """Leave the blocks in progress for the next run."""
        for journal in self._open:
            journal.close()
        self._open.clear()

    def is_blank(self) -> bool:
        """Whether the job has no results so far, and no task of it is running."""
        has_blocks = any(any(place.glob(f"part-*{_SUFFIX}")) for place in (self.folder, self.rejects))
        has_answers = any(holds_answers(path) for path in self.journals.glob("part-*"))
        return not (has_blocks or has_answers or any(self.ledgers.glob("*")) or self.running_tasks())

    def clear_journals(self) -> None:
        """Forget what is in progress."""
        for path in self.journals.glob("part-*"):
            path.unlink(missing_ok=True)

    def totals(self) -> tuple[ThinkingStatistics, int]:
        """What all finished blocks hold, and how many of them are missing or not as they were written."""
        total, num_gone = ThinkingStatistics(), 0
        inventory = self._inventory = Inventory(self.folder)
        present = {path.name for place in (self.folder, self.rejects) for path in place.glob(f"part-*{_SUFFIX}")}
        for entry in latest_entries(self.ledgers):
            is_whole = not any(map(inventory.difference, _files_of(entry.block)))
            if f"{entry.block}{_SUFFIX}" in present and is_whole:
                total.merge(entry.statistics)
            else:  # all its rows may have been blank
                num_gone += bool(entry.statistics.records or entry.statistics.rejects)
        return total, num_gone

    def finish(self, name: str, journal: Journal, ledger: Ledger, generator_s: float) -> ThinkingStatistics:
        """Write out a block whose rows are all in its journal and took `generator_s`, and return what it holds.

        A block that was written out before is replaced. The journal goes last: until then the block counts as
        unfinished, and is written out again.
        """
        before = ledger.entries.get(name)
        statistics, digests, end = ThinkingStatistics(generator_s=generator_s), [], 0
        if before is not None:
            statistics.generator_s += before.statistics.generator_s
        for line in journal.lines():
            for fields in line.records:
                statistics.add_record(Record(**fields))
            rejects, chunk_rejects = count_rejects(line.rejects)
            statistics.rejects.update(rejects)
            statistics.chunk_rejects.update(chunk_rejects)
            if line.id is not None:
                digests.append(id_digest(line.id))
            end = line.row + 1
        shard, rejects_path = (place / f"{name}{_SUFFIX}" for place in (self.folder, self.rejects))
        if statistics.rejects or statistics.chunk_rejects:
            self._write_rejects(rejects_path, journal)
        if statistics.records:
            write_records(shard, _records(journal))
        else:
            shard.unlink(missing_ok=True)
        if not (statistics.rejects or statistics.chunk_rejects):
            rejects_path.unlink(missing_ok=True)
        revision = before.revision + 1 if before is not None else 0
        ledger.add(Entry(name, end, numpy.array(digests, dtype=numpy.uint64), statistics, revision))
        self._inventory.add(ledger.writer, _files_of(name))
        for path in self._leftovers:  # of killed runs; those of other blocks may be being written by other tasks
            if path.name.endswith(f"-{name}{_SUFFIX}"):
                path.unlink(missing_ok=True)
        journal.remove()
        self._open.discard(journal)
        return statistics

    def read_block(self, name: str) -> tuple[list[Record], list[dict[str, Any]]]:
        """The records and the rejects of a block that is done. Raises UserError for other files than were written."""
        shard, rejects_path = (place / f"{name}{_SUFFIX}" for place in (self.folder, self.rejects))
        for file in _files_of(name):
            if (what := self._inventory.content_difference(file)) is not None:
                raise UserError(f"{self.folder / file}: {what}; run the job again, which repeats this block")
        records = list(read_records([shard])) if shard.exists() else []
        return records, list(read_rejects(rejects_path)) if rejects_path.exists() else []

    def names(self) -> list[str]:
        """The blocks that are done, in their order."""
        return sorted(self._done)

    def open_names(self) -> list[str]:
        """The blocks in progress, in their order."""
        return sorted(name_of(path) for path in self.journals.glob("part-*"))

    def _write_rejects(self, path: Path, journal: Journal) -> None:
        with json_lines(path) as add:
            for line in journal.lines():
                for reject in line.rejects:
                    add(json.dumps(reject).encode())


def read_rejects(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file in the folder of rejects."""
    with (
        path.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file) as unpacked,
        io.TextIOWrapper(unpacked, encoding="utf-8") as lines,
    ):
        yield from map(json.loads, lines)


def _records(journal: Journal) -> Iterator[Record]:
    for line in journal.lines():
        yield from (Record(**fields) for fields in line.records)
