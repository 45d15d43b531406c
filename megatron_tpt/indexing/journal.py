"""The working folder of an indexing job, and the journal in it from which a killed job resumes."""

import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.files import no_links, sync
from megatron_tpt.indexing.manifest import Source
from megatron_tpt.indexing.writer import Extent
from megatron_tpt.jobs.journal import append, encode, read_journal
from megatron_tpt.jobs.lock import locked

_NAME = "journal"
PUBLISHING = "publishing"
"""A file in the working folder: the files under the names of the output are ours."""


def working_path(prefix: Path) -> Path:
    """The hidden folder in which the index `prefix` is made. Raises UserError for the name of a folder."""
    if prefix.is_dir():
        raise UserError(f"{prefix} is a folder; --output takes a prefix, such as {prefix / 'train'}")
    return prefix.with_name(f".tmp-{prefix.name}")


def is_publishing(prefix: Path) -> bool:
    """Whether the files under the names of `prefix` were moved there by an unfinished run."""
    return (working_path(prefix) / PUBLISHING).exists()


def clear_leftovers(prefix: Path, kinds: Sequence[str] = ()) -> None:
    """Remove the working folder of a run that was killed after it had published everything."""
    if is_publishing(prefix):
        with working_folder(prefix, kinds):
            pass


def _withdraw(folder: Path, outputs: Sequence[Path]) -> None:
    """Remove what an unfinished run has moved to its names; the last of `outputs` makes it a finished one."""
    if (folder / PUBLISHING).exists() and not outputs[-1].exists():
        for path in outputs:
            _remove(path)
    _remove(folder / PUBLISHING)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def working_folder(prefix: Path, kinds: Sequence[str] = ()) -> Iterator[Path]:
    """The working folder of `prefix`, for this run alone. It stays only with a journal in it to resume by.

    Without a journal `kinds` are given, those of the files PREFIX.KIND, the manifest last: what a run that was stopped
    or killed while it published has moved to these names is removed.
    """
    folder = working_path(prefix)
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if _is_planted(lock, folder):
            raise UserError(
                f"{folder}: made by another user, in a folder that anyone may write to; choose another --output"
            )
        if not locked(lock, folder, timeout_s=0):
            raise UserError(f"{prefix} is being written by another process; wait for it to end")
        outputs = [Path(f"{prefix}.{kind}") for kind in kinds]
        if outputs:
            _withdraw(folder, outputs)
            for leftover in folder.iterdir():
                _remove(leftover)
        try:
            yield folder
        finally:
            if outputs:
                _withdraw(folder, outputs)
            if not (folder / _NAME).exists():
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if folder.is_symlink():
            raise UserError(f"{folder}: a link in the place of our working folder; remove it") from error
        raise UserError(f"{prefix}: cannot be written ({error.strerror or error})") from error
    finally:
        if lock is not None:
            os.close(lock)


def _is_planted(descriptor: int, folder: Path) -> bool:
    """Whether an open folder is that of another user, in one like /tmp, where names of others can be taken."""
    anyones = stat.S_ISVTX | stat.S_IWOTH
    is_anyones = folder.parent.stat().st_mode & anyones == anyones
    return is_anyones and os.fstat(descriptor).st_uid != os.geteuid()


@dataclass
class Counts:
    """What a shard holds in addition to its extent."""

    documents_with_thinking: int = 0
    thinking_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ClosedShard:
    """A shard whose `.bin` and `.idx` are complete."""

    number: int
    extent: Extent
    counts: Counts
    checksums: dict[str, str]


@dataclass(frozen=True)
class SourceDone:
    """How the job stood when a source had been written to its end."""

    source: Source
    documents_by_shard: dict[int, int]
    extent: Extent
    """Of the shard that was being written; those before it are closed."""
    counts: Counts


@dataclass
class Journal:
    """What is safely on the disk: closed shards and finished sources, in order.

    A line is written only after the data that it describes has been synced.
    """

    path: Path
    settings: dict[str, Any]
    """What the data depends on in addition to the sources."""
    shards: list[ClosedShard] = field(default_factory=list)
    sources: list[SourceDone] = field(default_factory=list)
    is_complete: bool = False
    """Whether the whole index is there, manifests and all, and has but to be moved to its name."""
    num_bytes: int = 0
    """Length of the valid part of the file."""

    @classmethod
    def read(cls, folder: Path) -> "Journal":
        """The journal in `folder`; an empty one, without settings, when there is none."""
        journal = cls(folder / _NAME, {})
        for entry, _, end in read_journal(journal.path):
            journal._take(entry)
            journal.num_bytes = end
        return journal

    def _take(self, entry: dict[str, Any]) -> None:
        if "settings" in entry:
            self.settings = entry["settings"]
        elif "shard" in entry:
            fields = entry["shard"]
            del self.shards[fields["number"] :]  # a killed run closed them, its successor repeated them
            extent, counts = Extent(*fields["extent"]), Counts(**fields["counts"])
            self.shards.append(ClosedShard(fields["number"], extent, counts, fields["checksums"]))
        elif "source" in entry:
            self.sources.append(_source_done(entry))
        self.is_complete = "complete" in entry

    def write(self, entries: Sequence[ClosedShard | SourceDone | str]) -> None:
        """Add entries, or the word "complete", and sync them to the disk."""
        lines: list[dict[str, Any]] = [{"settings": self.settings}] if self.num_bytes == 0 else []
        for entry in entries:
            if isinstance(entry, ClosedShard):
                lines.append({"shard": asdict(entry)})
            else:
                lines.append({entry: True} if isinstance(entry, str) else asdict(entry))
        data = encode(lines)
        with open(self.path, "ab", buffering=0, opener=no_links) as file:
            file.truncate(self.num_bytes)  # of a line that was not written whole
            append(file.fileno(), self.path, data)
            os.fsync(file.fileno())
        self.num_bytes += len(data)
        sync(self.path.parent)


def _source_done(entry: dict[str, Any]) -> SourceDone:
    by_shard = {int(shard): documents for shard, documents in entry["documents_by_shard"].items()}
    return SourceDone(Source(**entry["source"]), by_shard, Extent(*entry["extent"]), Counts(**entry["counts"]))
