"""Records to `.bin/.idx` with their manifests: the job behind `tools/index.py`.

One thread reads blocks of rows, several parse, encode and assemble them, the main thread writes the results in order.
Only a few blocks are on their way at a time, so memory does not grow with the input. What is written, and how a killed
job goes on, is in `output.py` and `journal.py`.
"""

import functools
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow

from megatron_tpt.errors import UserError
from megatron_tpt.indexing import sentences
from megatron_tpt.indexing.assemble import Assembler, Documents
from megatron_tpt.indexing.blocks import Block, End, read_source
from megatron_tpt.indexing.encoders import (
    DisagreementError,
    Encoded,
    Encoder,
    ReferenceEncoder,
    SpotCheck,
    choose_encoder,
)
from megatron_tpt.indexing.groups import Joined, grouped, join_blocks
from megatron_tpt.indexing.join import Join
from megatron_tpt.indexing.journal import Journal, working_folder, working_path
from megatron_tpt.indexing.manifest import IndexCounts, Manifest, Source, ThinkTokens, TokenizerInfo, compare_sources
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.originals import check_against_original, has_original
from megatron_tpt.indexing.output import Output, publish
from megatron_tpt.indexing.pieces import Flags, PieceMaker, Pieces, Rows
from megatron_tpt.indexing.raw_tags import RawTags
from megatron_tpt.indexing.sample import sample_texts
from megatron_tpt.indexing.shard_sets import shard_prefix
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.indexing.writer import MAX_DOCUMENT_TOKENS, token_dtype
from megatron_tpt.job_settings import EntryChanges, require_apart
from megatron_tpt.records import DAMAGED, Columns, Row, describe, expand_sources
from megatron_tpt.records import Source as Input
from megatron_tpt.sizes import num_bytes

_REPORT_EVERY_S = 10.0
_MAX_BLOCK_BYTES = 4 << 20
_MIN_BLOCK_BYTES = 128 << 10
_BASE_BYTES = 320 << 20  # libraries, tokenizers and their caches
_BYTES_PER_BLOCK_BYTE = 16  # the block, its columns, its tokens in the types of encoder and index


def index(options: IndexOptions) -> Manifest:
    """Index `options.input` into `options.output`.{bin,idx,json} and return the manifest. See `index_shards`."""
    assert options.shard_size is None, "a set of shards has several manifests"
    return index_shards(options)[0]


def index_shards(options: IndexOptions) -> list[Manifest]:
    """Index `options.input` and return the manifests, one for each shard.

    When that very index is there already, it is left alone. Raises UserError for bad input, for an output of
    other settings or of other hands, and when no document is left; then nothing new is there.
    """
    os.environ.setdefault("RAYON_NUM_THREADS", str(options.worker_count))  # the threads of both tokenizers
    job = _Job(options)
    if (finished := job.finished()) is not None:
        print(f"{options.output}: already done, {_summary(finished)}")
        return finished
    with working_folder(options.output) as folder:
        journal = job.journal(folder)
        if not journal.is_complete:
            job.build(folder, journal)
        manifests = job.publish(folder)
    seconds = time.monotonic() - job.started
    print(f"{options.output}: {_summary(manifests)}; {job.num_tokens / seconds:,.0f} tokens/s in {seconds:.3f} s")
    return manifests


def _summary(manifests: Sequence[Manifest]) -> str:
    counts = [manifest.counts for manifest in manifests]
    documents, with_thinking, tokens, document_tokens, thinking_tokens = (
        sum(getattr(count, name) for count in counts)
        for name in ("documents", "documents_with_thinking", "tokens", "document_tokens", "thinking_tokens")
    )
    skipped = sum((Counter(count.skipped) for count in counts), Counter[str]())
    reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
    return (
        f"{documents:,} documents ({with_thinking:,} with thinking), "
        f"{tokens:,} tokens ({document_tokens:,} document, {thinking_tokens:,} thinking)"
        + (f", {len(manifests)} shards" if len(manifests) > 1 else "")
        + (f", {skipped.total():,} bad records skipped ({reasons})" if skipped else "")
    )


class _Result(NamedTuple):
    """What became of some rows."""

    documents: Documents
    skipped: Counter[str]
    num_rows: int
    problem: Row | None
    """The bad record that stops the run; its number counts from the first of these rows."""


class _Job:
    """The settings of one run and what follows from them."""

    def __init__(self, options: IndexOptions) -> None:
        self.options = options
        self.columns = Columns(options.text_column, options.id_column)
        self.inputs = expand_sources(options.input)
        files = [input.path for input in self.inputs if input.path]
        require_apart(options.output, options.input, files, is_prefix=True)
        self.tokenizer = Tokenizer(options.tokenizer, parse_special_tokens=options.parse_special_tokens)
        self.shard_bytes = num_bytes("--shard-size", options.shard_size) if options.shard_size else None
        split = sentences.split if options.sentences else None
        self.maker = PieceMaker(self.columns, options.join, options.on_bad_record, split)
        self.started = time.monotonic()
        self.num_tokens = 0
        """Tokens that this run has written since `started`."""
        self.template = Manifest(
            tokenizer=TokenizerInfo.of(self.tokenizer),
            think=ThinkTokens(self.tokenizer.open_ids, self.tokenizer.close_ids),
            join=options.join.value,
            text_column=options.text_column,
            dtype=token_dtype(self.tokenizer.vocab_size),
            sources=[],
            counts=IndexCounts(0, 0, 0, 0, 0, {}),
            checksums={},
            command=sys.argv,
            append_eos=options.append_eos,
            parse_special_tokens=options.parse_special_tokens,
            shard_bytes=self.shard_bytes,
        )

    def finished(self) -> list[Manifest] | None:
        """The manifests of this very index when it exists. Raises UserError when something else is in its place."""
        prefix = self.options.output
        if Journal.read(working_path(prefix)).is_complete:
            return None  # it remains to be moved to its name
        found = self._existing_prefixes()
        if not found:
            return None
        advice = f"choose another --output or remove {self._names()}"
        if foreign := [existing for existing in found if not Manifest.path(existing).exists()]:
            raise UserError(f"{foreign[0]}.bin or .idx exists and was not made by this program; {advice}")
        manifests = [Manifest.read(existing) for existing in found]
        settings, input = self._differences(manifests)
        if input.only_added and not settings:
            advice = (
                "index the new files alone with another --output and join both with tools/merge_index.py, "
                f"or {advice} to index all again"
            )
        if differences := [*settings, *_input_phrase(input)]:
            raise UserError(
                f"{prefix}: was indexed before with other settings or input ({'; '.join(differences)}); {advice}"
            )
        for existing, manifest in zip(found, manifests, strict=True):
            manifest.check_files(existing)
        return manifests

    def _existing_prefixes(self) -> list[Path]:
        """Of the index, or of the shards of the set, that is there. Raises UserError for a set that is not whole."""
        prefix = self.options.output
        if self.shard_bytes is None:
            return [prefix] if any(Path(f"{prefix}.{kind}").exists() for kind in ("json", "bin", "idx")) else []
        pattern = f"{prefix.name}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].*"
        found = sorted({path.with_suffix("") for path in prefix.parent.glob(pattern)})
        num_shards = int(found[-1].name[-5:]) if found else 0
        expected = [shard_prefix(prefix, shard, num_shards) for shard in range(num_shards)]
        if odd := sorted({*found} ^ {*expected}):
            state = "is of another set" if odd[0] in found else "is missing"
            raise UserError(
                f"{prefix} is no whole set of {num_shards} shards: {odd[0]} {state}; "
                f"choose another --output or remove {self._names()}"
            )
        return found

    def _names(self) -> str:
        """A shell pattern for the files of this very index: PREFIX* would match those of PREFIX2 and PREFIX-eval."""
        shards = "" if self.shard_bytes is None else "-?????-of-?????"
        return f"{self.options.output}{shards}.{{bin,idx,json}}"

    def _differences(self, manifests: Sequence[Manifest]) -> tuple[list[str], EntryChanges]:
        """What of existing indices is not as this job would make it: settings, and the input."""
        first, wanted = manifests[0], self._settings()
        found = {
            "tokenizer": first.tokenizer.fingerprint,
            "end-of-sequence token": first.tokenizer.eos_id,
            "join": first.join,
            "text column": first.text_column,
            "choice of --append-eos": first.append_eos,
            "choice of --sentences": first.counts.sequences is not None,
            "choice of --parse-special-tokens": first.parse_special_tokens,
            # Manifests of earlier versions do not say.
            _SHARD_SIZE: self.shard_bytes if first.shard_bytes is None else first.shard_bytes,
        }
        sources = {source.path: source for manifest in manifests for source in manifest.sources}
        wanted = {name: wanted[name] for name in found}
        return _changes(found, wanted), compare_sources([*sources.values()], _files_by_name(self.inputs))

    def _settings(self) -> dict[str, Any]:
        """What the output depends on besides the inputs, by the names that messages give it."""
        options = self.options
        return {
            "tokenizer": self.template.tokenizer.fingerprint,
            "end-of-sequence token": self.template.tokenizer.eos_id,
            "join": options.join.value,
            "text column": options.text_column,
            "id column": options.id_column,
            "choice of --append-eos": options.append_eos,
            "choice of --sentences": options.sentences,
            "choice of --parse-special-tokens": options.parse_special_tokens,
            _SHARD_SIZE: self.shard_bytes,
        }

    def journal(self, folder: Path) -> Journal:
        """The journal to go on with. Raises UserError when it is that of other settings or inputs.

        Without a finished input there is nothing to go on with: what was left behind is cleared away.
        """
        journal, settings, inputs = Journal.read(folder), self._settings(), self.inputs
        done = [entry.source for entry in journal.sources]
        if not journal.is_complete:
            settings["--tokenizer-backend"] = self._encoder.name
            known = {source.path for source in done}  # what comes after these is still to be read
            inputs = [input for i, input in enumerate(inputs) if i < len(done) or _name(input) in known]
        if not done:
            for leftover in folder.iterdir():
                leftover.unlink()
            return Journal(journal.path, settings)
        input = compare_sources(done, _files_by_name(inputs))
        if differences := [*_changes(journal.settings, settings), *_input_phrase(input)]:
            raise UserError(
                f"{self.options.output}: an unfinished run has indexed {len(done)} input files with other settings or "
                f"input ({'; '.join(differences)}); restore them to resume, or choose another --output, or remove "
                f"{folder}"
            )
        if not journal.is_complete:
            print(f"resuming after {len(done)} of {len(self.inputs)} inputs", file=sys.stderr)
        return journal

    def build(self, folder: Path, journal: Journal) -> None:
        """Write all that is not yet written, and complete it."""
        itemsize = numpy.dtype(self.template.dtype).itemsize
        inputs = self.inputs[len(journal.sources) :]
        output = Output(
            folder,
            journal,
            self.tokenizer.vocab_size,
            itemsize,
            has_sentences=self.options.sentences,
            shard_bytes=self.shard_bytes,
        )
        with output:
            self.started, num_tokens_before = time.monotonic(), output.num_tokens
            if inputs:
                try:
                    self._write(inputs, output)
                except DisagreementError:
                    output.discard()  # of what is written, samples were compared
                    raise
            self.num_tokens = output.num_tokens - num_tokens_before
            if output.num_documents == 0:
                output.discard()
                skipped = ", ".join(f"{reason}: {count}" for reason, count in output.skipped.items())
                raise UserError(f"the input holds no document to index ({skipped or 'its files are empty'})")
            output.finish(self.template)

    def publish(self, folder: Path) -> list[Manifest]:
        """Move what is complete to its names."""
        num_shards = len(Journal.read(folder).shards)
        prefix = self.options.output
        prefixes = [prefix]
        if self.shard_bytes is not None:
            prefixes = [shard_prefix(prefix, shard, num_shards) for shard in range(num_shards)]
        publish(folder, prefixes)
        return [Manifest.read(published) for published in prefixes]

    @functools.cached_property
    def _encoder(self) -> Encoder:
        options = self.options
        original = has_original(self.tokenizer.folder)
        needs_sample = original or options.tokenizer_backend != "reference"
        sample = sample_texts(self.inputs, self.columns) if needs_sample else []
        if original:
            check_against_original(self.tokenizer, sample)
        return choose_encoder(self.tokenizer, options.tokenizer_backend, sample, options.worker_count)

    def _encode_function(self) -> Callable[["list[Block | End]"], "list[_Result | End]"]:
        options, encoder = self.options, self._encoder
        check = None if isinstance(encoder, ReferenceEncoder) else SpotCheck(self.tokenizer, encoder).check
        end_ids = [self.tokenizer.eos_id] if options.append_eos else []
        dtype = numpy.dtype(self.template.dtype)
        assembler = Assembler(self.tokenizer.open_ids, self.tokenizer.close_ids, end_ids, dtype)
        raw_tags = RawTags([] if options.join is Join.document_only else self.tokenizer.tag_spellings())

        def encode_pieces(rows: Rows, pieces: Pieces) -> _Result:
            encoded = encoder.encode(pieces.texts)
            if check is not None:
                check(pieces.texts, encoded)
            encoded = raw_tags.spell_out(encoded, pieces.flags)
            skipped, problem = pieces.skipped, pieces.problem
            for reason, find_bad in (
                (_NO_TOKENS, _are_empty),
                (_FIXED_TAG, raw_tags.find_fixed),
                (_TOO_LONG, assembler.are_too_long),
            ):
                is_bad = find_bad(encoded, pieces.flags)
                if is_bad.any():
                    if options.on_bad_record == "stop":
                        return _Result(assembler.nothing(), skipped, 0, self._bad_row(rows, pieces, is_bad, reason))
                    pieces, encoded, num_dropped = _without(is_bad, pieces, encoded)
                    skipped = skipped + Counter({reason: num_dropped})
            documents = assembler.assemble(encoded, pieces.flags)
            return _Result(documents, skipped, pieces.num_rows, problem)

        def encode_joined(joined: Joined) -> Iterator[_Result] | None:
            """The results of several blocks at once; None where the records have to be looked at block by block."""
            (rows, pieces), *more = self.maker.make(joined.rows)
            if more or pieces.skipped or pieces.problem:
                return None
            result = encode_pieces(rows, pieces)
            num_rows = sum(joined.num_rows)
            if result.problem or result.skipped or len(result.documents) != num_rows:  # blank lines make no document
                return None
            ends = accumulate(joined.num_rows)
            return (
                _Result(result.documents.part(end - count, end), Counter(), count, None)
                for count, end in zip(joined.num_rows, ends, strict=True)
            )

        def encode(group: list[Block | End]) -> list[_Result | End]:
            joined = join_blocks(group)
            if joined is not None and (together := encode_joined(joined)) is not None:
                return [item if isinstance(item, End) else next(together) for item in group]
            return [result for item in group for result in encode_one(item)]

        def encode_one(item: Block | End) -> Iterator[_Result | End]:
            if isinstance(item, End):
                yield item
            else:
                yield from (encode_pieces(*part) for part in self.maker.make(item.rows))

        return encode

    def _bad_row(self, rows: Rows, pieces: Pieces, is_bad: numpy.ndarray, reason: str) -> Row:
        number = self.maker.row_number(rows, int(pieces.document_numbers[numpy.argmax(is_bad)]))
        return Row(number, None, reason, _DETAILS[reason])

    def _write(self, inputs: Sequence[Input], output: Output) -> None:
        """Read, encode and write the inputs, all at the same time."""
        workers = self.options.worker_count
        memory = num_bytes("--max-memory", self.options.max_memory) - _BASE_BYTES
        block_bytes = memory // (_BYTES_PER_BLOCK_BYTE * (2 * workers + 2))
        block_bytes = max(_MIN_BLOCK_BYTES, min(_MAX_BLOCK_BYTES, block_bytes))
        blocks = (block for input in inputs for block in read_source(input, self.columns, block_bytes))
        remaining = iter(inputs)
        input, num_rows = next(remaining), 0
        progress = _Progress(output)
        with (
            closing(_ahead(grouped(blocks), 2)) as read,
            closing(_in_order(self._encode_function(), read, workers)) as results,
        ):
            for result in chain.from_iterable(results):
                if isinstance(result, End):
                    if result.damage is not None:
                        raise UserError(describe(input, Row(num_rows, None, DAMAGED, result.damage)))
                    input.require_content(result.checksum)
                    if not num_rows:
                        print(f"warning: {input.name}: holds no rows", file=sys.stderr)
                    output.end_source(_manifest_source(input, result.checksum))
                    input, num_rows = next(remaining, input), 0
                    continue
                if result.problem is not None:
                    raise UserError(describe(input, result.problem._replace(number=num_rows + result.problem.number)))
                output.add(result.documents, result.skipped)
                num_rows += result.num_rows
                progress.report()


_NO_TOKENS, _TOO_LONG, _FIXED_TAG = "no tokens", "too long", "a think tag in raw text"
_DETAILS = {
    _NO_TOKENS: "(the tokenizer knows no character of it)",
    _FIXED_TAG: "(the tokenizer has no think tokens, and one way to spell the tag: add them to it, or give --join "
    "document_only)",
    _TOO_LONG: f"(a sequence of the format holds {MAX_DOCUMENT_TOKENS:,} tokens)",
}
_SHARD_SIZE = "--shard-size in bytes"


def _are_empty(encoded: Encoded, _: Flags) -> numpy.ndarray:
    return encoded.lengths == 0


def _without(is_bad: numpy.ndarray, pieces: Pieces, encoded: Encoded) -> tuple[Pieces, Encoded, int]:
    """Without the documents of which a piece is bad, and how many these are."""
    numbers = pieces.document_numbers
    dropped = numpy.unique(numbers[is_bad])
    keep = ~numpy.isin(numbers, dropped)
    kept = replace(pieces, texts=pieces.texts.filter(pyarrow.array(keep)), flags=pieces.flags[keep])
    tokens = encoded.tokens[numpy.repeat(keep, encoded.lengths)]
    return kept, Encoded(tokens, encoded.lengths[keep]), len(dropped)


def _name(input: Input) -> str:
    """What the manifest calls an input."""
    return str(input.real_path) if input.real_path else input.name


def _manifest_source(input: Input, checksum: str) -> Source:
    if input.path is None:
        return Source(input.name, 0, 0, 0, "")
    status = input.path.stat()
    return Source(_name(input), 0, status.st_size, status.st_mtime_ns, checksum)


def _changes(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The settings that differ, and from what to what where that is short."""
    changes = []
    for name, now in wanted.items():
        before = found.get(name)
        if before != now:
            values = f" was {before}, now {now}"
            changes.append(name + (values if len(values) < 80 else " differs"))
    return changes


def _files_by_name(inputs: Sequence[Input]) -> dict[str, Path | None]:
    """Where the inputs are, by the names that manifests give them."""
    return {_name(input): input.path for input in inputs}


def _input_phrase(input: EntryChanges) -> list[str]:
    """The difference of an input as one phrase; none where there is no difference."""
    return [f"input: {phrase}"] if (phrase := input.describe()) else []


def _ahead[T](items: Iterator[T], depth: int) -> Generator[T]:
    """`items`, produced in a thread of their own, `depth` of them ahead of what is asked for."""
    end: Any = object()
    with ThreadPoolExecutor(1) as executor:
        pending = deque(executor.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(executor.submit(next, items, end))
            yield item


def _in_order[A, B](function: Callable[[A], B], items: Iterable[A], workers: int) -> Generator[B]:
    """function(item) of every item, done by so many threads, in the order of the items.

    What came before an error of `items` is handed out before it is raised.
    """
    pending: deque[Future[B]] = deque()
    iterator, end, error = iter(items), object(), None
    with ThreadPoolExecutor(workers) as executor:
        while True:
            try:
                item: Any = next(iterator, end)
            except Exception as caught:
                error = caught
                break
            if item is end:
                break
            pending.append(executor.submit(function, item))
            if len(pending) > workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    if error is not None:
        raise error


class _Progress:
    """Says from time to time how far the job is."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._num_tokens_before = output.num_tokens
        self._started = self._last = time.monotonic()

    def report(self) -> None:
        now = time.monotonic()
        if now - self._last >= _REPORT_EVERY_S:
            self._last = now
            documents, tokens = self._output.num_documents, self._output.num_tokens
            rate = (tokens - self._num_tokens_before) / (now - self._started)
            print(f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
