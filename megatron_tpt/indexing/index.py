"""Records to one `.bin/.idx` with its manifest: the job behind `tools/index.py`.

All is written in a hidden working folder beside the output and moved into place when it is complete, the
manifest last. A killed run leaves only that folder, which the next run of the same command clears away.
"""

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.join import Piece, pieces
from megatron_tpt.indexing.manifest import IndexCounts, Manifest, Source, ThinkTokens, TokenizerInfo, file_checksum
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.tokenizer import Tokenizer, Tokens
from megatron_tpt.indexing.writer import IndexWriter, token_dtype
from megatron_tpt.records import ReadCounts, Record, expand_inputs, read_records

_CHARACTERS_PER_BATCH = 1 << 20
_RECORDS_PER_BATCH = 4096
_REPORT_EVERY_S = 10.0


def index(options: IndexOptions) -> Manifest:
    """Index `options.input` into `options.output`.{bin,idx,json} and return the manifest.

    When that very index is there already, it is left alone. Raises UserError for bad input, for an output of
    other settings or of other hands, and when no document is left; then nothing new is there.
    """
    files = expand_inputs(options.input)
    tokenizer = Tokenizer(options.tokenizer)
    if (finished := _finished(options, files, tokenizer)) is not None:
        print(f"{options.output}: already done, {_summary(finished.counts)}")
        return finished
    started = time.monotonic()
    with _working_folder(options.output) as folder:
        job = _Job(options, tokenizer, IndexWriter(folder / "bin", folder / "idx", tokenizer.vocab_size))
        with job.writer:
            sources = [job.add_file(path) for path in files]
            job.require_documents()
        manifest = job.manifest(sources)
        _publish(folder, options.output, manifest)
    tokens_per_s = manifest.counts.tokens / (time.monotonic() - started)
    print(f"{options.output}: {_summary(manifest.counts)}; {tokens_per_s:,.0f} tokens/s")
    return manifest


def _summary(counts: IndexCounts) -> str:
    skipped = sum(counts.skipped.values())
    reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.skipped.items())
    return (
        f"{counts.documents:,} documents ({counts.documents_with_thinking:,} with thinking), "
        f"{counts.tokens:,} tokens ({counts.document_tokens:,} document, {counts.thinking_tokens:,} thinking)"
        + (f", {skipped:,} bad records skipped ({reasons})" if skipped else "")
    )


@dataclass
class _Job:
    """The counts and the writer of one run."""

    options: IndexOptions
    tokenizer: Tokenizer
    writer: IndexWriter
    counts: ReadCounts = field(default_factory=ReadCounts)
    thinking_tokens: int = 0
    documents_with_thinking: int = 0
    started: float = field(default_factory=time.monotonic)
    last_report: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        ids = (self.tokenizer.open_ids, self.tokenizer.close_ids, [self.tokenizer.eos_id])
        self.open, self.close, self.eos = (numpy.asarray(tokens, dtype=numpy.int32) for tokens in ids)

    def add_file(self, path: Path) -> Source:
        """Index the records of one file."""
        status = path.stat()
        documents_before = self.writer.num_documents
        records = read_records(
            [path],
            text_column=self.options.text_column,
            id_column=self.options.id_column,
            on_bad_record=self.options.on_bad_record,
            counts=self.counts,
        )
        with ThreadPoolExecutor(max_workers=1) as beside:  # hashing lets go of the interpreter lock
            checksum = beside.submit(file_checksum, path)
            for batch in _batches(records):
                self._add_batch(path, batch)
                self._report()
        num_documents = self.writer.num_documents - documents_before
        return Source(str(path.resolve()), num_documents, status.st_size, status.st_mtime_ns, checksum.result())

    def _add_batch(self, path: Path, batch: Sequence[Record]) -> None:
        samples = [list(pieces(record, self.options.join)) for record in batch]
        encoded = iter(self.tokenizer.encode_batch([piece.text for sample in samples for piece in sample]))
        for record, sample in zip(batch, samples, strict=True):
            tokens = [next(encoded) for _ in sample]
            if not sample:
                self._bad_record(path, record, "no thinking", "join thinking_only needs it")
            elif any(len(part) == 0 for part in tokens):
                self._bad_record(path, record, "no tokens", "the tokenizer knows no character of it")
            else:
                self._add_sample(sample, tokens)

    def _add_sample(self, sample: Sequence[Piece], tokens: Sequence[Tokens]) -> None:
        parts: list[Tokens] = []
        for piece, part in zip(sample, tokens, strict=True):
            if piece.is_thinking:
                parts += [self.open, part, self.close]
                self.thinking_tokens += len(self.open) + len(part) + len(self.close)
                self.documents_with_thinking += 1
            else:
                parts.append(part)
        self.writer.add_document(numpy.concatenate([*parts, self.eos]))

    def _bad_record(self, path: Path, record: Record, reason: str, detail: str) -> None:
        if self.options.on_bad_record == "stop":
            raise UserError(f"{path}: record {record.id}: {reason} ({detail}); skip such with --on-bad-record skip")
        self.counts.skipped[reason] += 1

    def _report(self) -> None:
        now = time.monotonic()
        if now - self.last_report >= _REPORT_EVERY_S:
            self.last_report = now
            documents, tokens = self.writer.num_documents, self.writer.num_tokens
            rate = tokens / (now - self.started)
            print(f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s", file=sys.stderr, flush=True)

    def require_documents(self) -> None:
        if self.writer.num_documents == 0:
            skipped = ", ".join(f"{reason}: {count}" for reason, count in self.counts.skipped.items())
            raise UserError(f"the input holds no document to index ({skipped or 'its files are empty'})")

    def manifest(self, sources: list[Source]) -> Manifest:
        num_tokens = self.writer.num_tokens
        return Manifest(
            tokenizer=_tokenizer_info(self.tokenizer),
            think=ThinkTokens(self.tokenizer.open_ids, self.tokenizer.close_ids),
            join=self.options.join.value,
            text_column=self.options.text_column,
            dtype=token_dtype(self.tokenizer.vocab_size),
            sources=sources,
            counts=IndexCounts(
                documents=self.writer.num_documents,
                documents_with_thinking=self.documents_with_thinking,
                tokens=num_tokens,
                document_tokens=num_tokens - self.thinking_tokens,
                thinking_tokens=self.thinking_tokens,
                skipped=dict(self.counts.skipped),
            ),
            checksums=self.writer.checksums(),
            command=sys.argv,
        )


def _tokenizer_info(tokenizer: Tokenizer) -> TokenizerInfo:
    folder = str(tokenizer.folder.resolve())
    return TokenizerInfo(folder, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id)


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Batches large enough to encode well, and bounded in records and characters."""
    batch: list[Record] = []
    num_characters = 0
    for record in records:
        batch.append(record)
        num_characters += len(record.text) + len(record.thinking or "")
        if num_characters >= _CHARACTERS_PER_BATCH or len(batch) >= _RECORDS_PER_BATCH:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _finished(options: IndexOptions, files: Sequence[Path], tokenizer: Tokenizer) -> Manifest | None:
    """The manifest of this very index when it exists. Raises UserError when something else is in its
    place.
    """
    prefix = options.output
    existing = [path for kind in ("json", "bin", "idx") if (path := Path(f"{prefix}.{kind}")).exists()]
    if not existing or (Manifest.path(prefix) not in existing and _working_path(prefix).exists()):
        return None  # nothing there, or what a killed run was moving into place
    advice = f"choose another --output or remove {prefix}.{{bin,idx,json}}"
    if Manifest.path(prefix) not in existing:
        raise UserError(f"{existing[0]} exists and was not made by this program; {advice}")
    manifest = Manifest.read(prefix)
    differences = [
        name
        for name, found, wanted in (
            ("tokenizer", manifest.tokenizer.fingerprint, tokenizer.fingerprint),
            ("end-of-sequence token", manifest.tokenizer.eos_id, tokenizer.eos_id),
            ("join", manifest.join, options.join.value),
            ("text column", manifest.text_column, options.text_column),
            ("list of input files", [source.path for source in manifest.sources], [str(f.resolve()) for f in files]),
        )
        if found != wanted
    ]
    if not differences and not all(map(Source.is_still, manifest.sources, files)):
        differences = ["content of the input files"]
    if differences:
        raise UserError(f"{prefix} was indexed before with another {', '.join(differences)}; {advice}")
    manifest.check_files(prefix)
    return manifest


def _working_path(prefix: Path) -> Path:
    return prefix.with_name(f".tmp-{prefix.name}")


@contextmanager
def _working_folder(prefix: Path) -> Iterator[Path]:
    """An empty folder beside the output, for this run alone; gone at the end, with what a killed run left in
    it.
    """
    if prefix.is_dir():
        raise UserError(f"{prefix} is a folder; --output takes a prefix, such as {prefix / 'train'}")
    folder = _working_path(prefix)
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{prefix} is being written by another process; wait for it to end") from None
        try:
            for leftover in folder.iterdir():
                leftover.unlink()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{prefix}: cannot be written ({error.strerror or error})") from error
    finally:
        if lock is not None:
            os.close(lock)


def _publish(folder: Path, prefix: Path, manifest: Manifest) -> None:
    """Flush the finished files to the disk and move them to their names, the manifest last."""
    manifest.write(folder / "manifest")
    for kind in ("bin", "idx"):
        with (folder / kind).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(folder / kind, f"{prefix}.{kind}")
    os.replace(Manifest.path(folder / "manifest"), Manifest.path(prefix))
    parent = os.open(prefix.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
