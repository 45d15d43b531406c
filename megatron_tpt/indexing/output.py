"""The files that an indexing job writes: one index or a set of shards, complete or absent, and resumable per source."""

import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.files import no_links, sync, sync_tree
from megatron_tpt.indexing.assemble import Documents
from megatron_tpt.indexing.journal import PUBLISHING, ClosedShard, Counts, Journal, SourceDone
from megatron_tpt.indexing.manifest import IndexCounts, Manifest, Source
from megatron_tpt.indexing.writer import Extent, IndexWriter

KINDS = ("bin", "idx", "json")
"""The files of an index, the manifest last."""


class Output:
    """Writes documents to `.bin/.idx` in a working folder, one shard after the other.

    A shard ends before the document that would make its `.bin` larger than `shard_bytes`; without that there is one.
    When a source has been written to its end, that is put into the journal once the data is synced: a job that is
    killed resumes after the last such source, whatever was written after it.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        vocab_size: int,
        itemsize: int,
        *,
        has_sentences: bool = False,
        shard_bytes: int | None = None,
    ) -> None:
        self._folder, self._journal = folder, journal
        self._vocab_size, self._has_sentences = vocab_size, has_sentences
        self._max_tokens = shard_bytes // itemsize if shard_bytes else None
        self._background = ThreadPoolExecutor(1)  # syncing waits for the disk
        self._syncing: Future[None] | None = None
        self._pending: list[ClosedShard | SourceDone | str] = []
        self._documents_by_shard: dict[int, int] = {}
        self._counts = Counts()
        extent = None
        if journal.sources:
            last = journal.sources[-1]
            extent, self._counts = last.extent, _copy(last.counts)
            del journal.shards[max(last.documents_by_shard, default=0) :]
        self._writer = self._open_shard(extent)

    def add(self, documents: Documents, skipped: Mapping[str, int]) -> None:
        """Append documents of the current source, and count the bad records that were skipped."""
        for reason, count in skipped.items():
            self._counts.skipped[reason] = self._counts.skipped.get(reason, 0) + count
        while self._max_tokens is not None and len(documents):
            bounds = documents.token_bounds()
            room = self._max_tokens - self._writer.num_tokens
            num_fitting = int(numpy.searchsorted(bounds, room, side="right")) - 1
            # A document that is larger than a shard has one to itself.
            num_fitting = max(num_fitting, 1 if self._writer.num_documents == 0 else 0)
            if num_fitting >= len(documents):
                break
            self._append(documents.part(0, num_fitting))
            self._close_shard()
            documents = documents.part(num_fitting, len(documents))
        self._append(documents)

    def end_source(self, source: Source) -> None:
        """Take note that a source has been written to its end (its number of documents is filled in here)."""
        by_shard = self._documents_by_shard or {len(self._journal.shards): 0}
        self._documents_by_shard = {}
        source = replace(source, documents=sum(by_shard.values()))
        # The current shard is the last key: resuming looks there.
        by_shard.setdefault(len(self._journal.shards), 0)
        done = SourceDone(source, by_shard, self._writer.extent, _copy(self._counts))
        self._journal.sources.append(done)
        self._pending.append(done)
        if self._syncing is None or self._syncing.done():
            self._writer.flush()
            self._commit()

    @property
    def num_documents(self) -> int:
        """In all shards."""
        return sum(shard.extent.documents for shard in self._journal.shards) + self._writer.num_documents

    @property
    def num_tokens(self) -> int:
        """In all shards."""
        return sum(shard.extent.tokens for shard in self._journal.shards) + self._writer.num_tokens

    @property
    def skipped(self) -> dict[str, int]:
        """Bad records skipped, by reason, in the current shard."""
        return self._counts.skipped

    def finish(self, template: Manifest) -> list[Manifest]:
        """Complete and sync all files, and return the manifests: `template` with what each shard holds."""
        self._close_shard(is_last=True)
        self._wait()
        manifests = [self._manifest(number, template) for number in range(len(self._journal.shards))]
        for number, manifest in enumerate(manifests):
            manifest.write(self._folder / f"{number:05d}")
        self._journal.write([*self._pending, "complete"])
        return manifests

    def discard(self) -> None:
        """Remove what a later run could resume from."""
        self._wait()
        self._pending = []
        self._journal.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._writer.__exit__(kind, error, trace)
            self._wait()
            if any(isinstance(entry, SourceDone) for entry in self._pending):
                self._commit()
        self._background.shutdown()

    def _append(self, documents: Documents) -> None:
        if len(documents):
            self._writer.add_documents(documents.tokens, documents.sequence_lengths, documents.sequences_per_document)
            shard = len(self._journal.shards)
            self._documents_by_shard[shard] = self._documents_by_shard.get(shard, 0) + len(documents)
            self._counts.documents_with_thinking += int(numpy.count_nonzero(documents.thinking_tokens))
            self._counts.thinking_tokens += int(documents.thinking_tokens.sum())

    def _path(self, shard: int, kind: str) -> Path:
        return self._folder / f"{shard:05d}.{kind}"

    def _open_shard(self, extent: Extent | None = None) -> IndexWriter:
        shard = len(self._journal.shards)
        bin_path, idx_path = self._path(shard, "bin"), self._path(shard, "idx")
        return IndexWriter(bin_path, idx_path, self._vocab_size, has_sentences=self._has_sentences, resume_at=extent)

    def _close_shard(self, *, is_last: bool = False) -> None:
        with self._writer:
            pass
        self._wait()
        closed = ClosedShard(len(self._journal.shards), self._writer.extent, self._counts, self._writer.checksums())
        for kind in ("bin", "idx"):
            sync(self._path(len(self._journal.shards), kind))
        self._journal.shards.append(closed)
        self._pending.append(closed)
        if not is_last:
            self._counts = Counts()
            self._writer = self._open_shard()

    def _commit(self) -> None:
        """Sync what has been written, then say so in the journal; the job continues meanwhile."""
        if self._syncing is not None:
            self._syncing.result()
        entries, self._pending = self._pending, []
        paths = [
            path
            for kind in ("bin", "idx", "idx-documents")
            if (path := self._path(len(self._journal.shards), kind)).exists()
        ]

        def write() -> None:
            for path in paths:
                sync(path)
            self._journal.write(entries)

        self._syncing = self._background.submit(write)

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def _manifest(self, shard: int, template: Manifest) -> Manifest:
        closed = self._journal.shards[shard]
        sources = [
            replace(done.source, documents=done.documents_by_shard[shard])
            for done in self._journal.sources
            if shard in done.documents_by_shard
        ]
        extent, counts = closed.extent, closed.counts
        index_counts = IndexCounts(
            documents=extent.documents,
            documents_with_thinking=counts.documents_with_thinking,
            tokens=extent.tokens,
            document_tokens=extent.tokens - counts.thinking_tokens,
            thinking_tokens=counts.thinking_tokens,
            skipped=counts.skipped,
            sequences=extent.sequences if self._has_sentences else None,
        )
        return replace(template, sources=sources, counts=index_counts, checksums=closed.checksums)


def _copy(counts: Counts) -> Counts:
    return replace(counts, skipped=dict(counts.skipped))


def publish(folder: Path, prefixes: Sequence[Path], kinds: Sequence[str] = KINDS) -> None:
    """Flush complete files to the disk and move them from the working folder to their names, the manifests last. Can be
    repeated.

    Raises UserError, and moves nothing, when one of these names is taken.
    """
    moves = [
        [
            (path, Path(f"{prefix}.{kind}"))
            for shard, prefix in enumerate(prefixes)
            if (path := folder / f"{shard:05d}.{kind}").exists()
        ]
        for kind in kinds
    ]
    for _, target in itertools.chain(*moves):  # what has been moved before is no longer in the folder
        if target.exists():
            raise UserError(
                f"{target} exists and was not made by this program; remove it and run the same command again, or "
                f"choose another --output"
            )
    open(folder / PUBLISHING, "ab", opener=no_links).close()
    sync_tree(folder)
    for moves_of_kind in moves:
        for path, target in moves_of_kind:
            os.replace(path, target)
        sync(prefixes[0].parent)
    shutil.rmtree(folder)
