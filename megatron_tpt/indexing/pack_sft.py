"""Examples to a packed index: the job behind `tools/pack_sft.py`.

The examples are tokenized once, in as many processes as wanted, into a hidden folder next to the output, in the order
of the input; then they are placed, and copied row by row. A killed run leaves only that folder, which the next run of
the same command removes.
"""

import contextlib
import functools
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tpt.errors import StoppedEarly, Terminated, UserError
from megatron_tpt.files import file_checksum
from megatron_tpt.indexing.conversations import BadExample, ConversationFormat, Example, PairFormat
from megatron_tpt.indexing.example_files import EncodedBatch, FieldBatch, encode_batch, read_batches
from megatron_tpt.indexing.example_store import ExampleStore, TurnEnds
from megatron_tpt.indexing.journal import clear_leftovers, is_publishing, working_folder
from megatron_tpt.indexing.manifest import Source, TokenizerInfo, compare_sources
from megatron_tpt.indexing.output import publish
from megatron_tpt.indexing.pack_manifest import PackCounts, PackManifest, PackSettings
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packing import Packing, pack
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.tokenizer import Tokenizer, copy_tokenizer
from megatron_tpt.jobs.ordered_workers import map_in_order
from megatron_tpt.jobs.progress import ProgressLine
from megatron_tpt.jobs.settings import require_apart
from megatron_tpt.logs import print_result
from megatron_tpt.names import counted, first_few
from megatron_tpt.processes import terminations_raised
from megatron_tpt.records import Source as Input
from megatron_tpt.records import expand_files
from megatron_tpt.records.where import Where

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0
_KINDS = ("bin", "idx", "sft", "tokenizer", "sft.json")
_MAX_NAMED = 3


def pack_sft(options: PackOptions) -> PackManifest:
    """Pack `options.input` into `options.output`.{bin,idx,sft,sft.json,tokenizer} and return the manifest.

    When that very index is there already, its checksums are verified and it is left alone. Raises UserError for bad
    input, for an output of other settings or of another program, and when no example is left; then nothing new is
    written.
    """
    inputs = {input.path: input for input in expand_files(options.input) if input.path}
    require_apart(options.output, options.input, inputs, is_prefix=True)
    with _interruptions_named(options.output):
        return _pack(options, inputs)


def _pack(options: PackOptions, inputs: Mapping[Path, Input]) -> PackManifest:
    encoding = _Encoding.of(options)
    settings = encoding.settings(options)
    if (finished := _finished(options.output, settings, encoding.tokenizer, [*inputs])) is not None:
        clear_leftovers(options.output, _KINDS)
        print_result(f"{options.output}: already done and whole; {_summary(finished)}")
        return finished
    with (
        working_folder(options.output, _KINDS) as folder,
        ExampleStore(folder / "examples", encoding.tokenizer.vocab_size) as store,
    ):
        collector = _Collector(options, encoding, store)
        sources = collector.read(inputs)
        collector.finish()
        packing = pack(store.lengths(), options.sequence_length + 1)
        part = folder / "00000"
        checksums = store.write_packed(packing, part)
        tokenizer = PackManifest.tokenizer_path(part)
        copy_tokenizer(encoding.tokenizer.folder, tokenizer, encoding.template_text)
        counts = collector.counts(packing)
        manifest = PackManifest(
            settings=settings,
            tokenizer=TokenizerInfo.of(encoding.tokenizer),
            sources=sources,
            counts=counts,
            efficiency=counts.efficiency(options.sequence_length),
            loss_mask=encoding.loss_mask,
            checksums=checksums,
            command=sys.argv,
            tokenizer_checksums={path.name: file_checksum(path) for path in sorted(tokenizer.iterdir())},
            end_of_turn_ids=collector.turn_ends.ids(),
            chat_template_kwargs=options.template_variables(),
        )
        manifest.write(part)
        publish(folder, [options.output], _KINDS)
    print_result(f"{options.output}: {_summary(manifest)}")
    return manifest


class _Encoding(NamedTuple):
    """How records become examples, and what is to be kept of that."""

    tokenizer: Tokenizer
    format: PairFormat | ConversationFormat
    loss_mask: str
    """Where it comes from."""
    special_ids: frozenset[int]
    """The tokens that may end a turn."""
    template_text: str | None = None
    template_checksum: str | None = None

    @classmethod
    def of(cls, options: PackOptions) -> "_Encoding":
        """Raises UserError for a tokenizer or a template that is not fit."""
        from megatron_tpt.indexing.example_formats import choose_format

        tokenizer = Tokenizer(options.tokenizer)
        format, template, loss_mask = choose_format(options, tokenizer)
        ends = frozenset([tokenizer.eos_id])
        if template is None:
            return cls(tokenizer, format, loss_mask, ends)
        return cls(tokenizer, format, loss_mask, ends | template.special_ids, template.text, template.checksum)

    def settings(self, options: PackOptions) -> PackSettings:
        """What decides, with the input, every byte of the index."""
        return PackSettings(
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            eos_id=self.tokenizer.eos_id,
            columns=self.format.columns,
            chat_template=self.template_checksum,
            date=options.date,
            sequence_length=options.sequence_length,
            on_too_long=options.on_too_long,
            on_bad_example=options.on_bad_record,
            chat_template_kwargs=options.template_variables(),
            tools_column=options.tools_column,
            inline_reasoning=options.inline_reasoning,
            ignore_fields=tuple(options.ignore_fields),
            where=options.where,
        )


def _encoder(options: PackOptions) -> Callable[[FieldBatch], EncodedBatch]:
    """What encodes batches of records. Called in every worker."""
    return functools.partial(encode_batch, format=_Encoding.of(options).format)


class _Collector:
    """Moves the examples of files into a store, and counts their results."""

    def __init__(self, options: PackOptions, encoding: _Encoding, store: ExampleStore) -> None:
        self._options = options
        self._encoding = encoding
        self.where = Where(options.where) if options.where is not None else None
        self._store = store
        self.turn_ends = TurnEnds(encoding.special_ids)
        self._skipped: Counter[str] = Counter()
        self._skipped_example: dict[str, str] = {}
        self._notes = encoding.format.take_notes()
        self._num_truncated = 0
        self._open_ended: list[str] = []

    def read(self, inputs: Mapping[Path, Input]) -> list[Source]:
        """Read all files to their ends. Raises UserError for one that is not what the job that wrote it recorded."""
        files = [*inputs]
        num_examples = dict.fromkeys(files, 0)
        hasher = ThreadPoolExecutor(max_workers=1)  # hashing releases the interpreter lock
        try:
            about = {path: (path.stat(), hasher.submit(file_checksum, path)) for path in files}
            with contextlib.closing(self._encoded(files)) as encoded, ProgressLine(_LOG_EVERY_S) as line:
                for batch, (outcomes, notes) in encoded:
                    before = len(self._store)
                    self._skipped.update(batch.unselected)
                    self._notes.update(notes)
                    for number, outcome in outcomes:
                        self._take(f"{batch.path}:{number}", outcome)
                    num_examples[batch.path] += len(self._store) - before
                    line.show(lambda: f"{len(self._store):,} examples read")
            for path, input in inputs.items():
                input.require_content(about[path][1].result())
            return [_source(path, num_examples[path], *about[path]) for path in files]
        finally:
            hasher.shutdown(cancel_futures=True)

    def _encoded(self, files: Sequence[Path]) -> Generator[tuple[FieldBatch, EncodedBatch]]:
        """Batches of records, and their results, in the order of the input."""
        batches = (batch for path in files for batch in read_batches(path, self._encoding.format, self.where))
        num_workers = self._options.worker_count(sum(path.stat().st_size for path in files))
        if num_workers == 1:
            return ((batch, encode_batch(batch, self._encoding.format)) for batch in batches)
        return map_in_order(functools.partial(_encoder, self._options), batches, num_workers, str)

    def _take(self, place: str, outcome: list[Example] | BadExample) -> None:
        if not isinstance(outcome, BadExample):
            for example in outcome:
                self._add(place, example)
        elif self._options.on_bad_record == "skip":
            self._skip(outcome.reason, place, outcome.detail)
        else:
            raise UserError(f"{place}: {outcome}; or skip such records and count them: --on-bad-record skip")

    def _add(self, place: str, example: Example) -> None:
        capacity = self._options.sequence_length + 1
        num_tokens, kept = len(example.tokens), example
        if num_tokens > capacity:
            size = f"{num_tokens} tokens, a row holds {capacity}"
            if self._options.on_too_long == "stop":
                raise UserError(
                    f"{place}: {size}: raise --sequence-length, or give --on-too-long skip or --on-too-long truncate"
                )
            kept = Example(example.tokens[:capacity], example.has_loss[:capacity])
            if self._options.on_too_long == "skip" or not kept.has_loss.any():
                self._skip("too long", place, size)
                return
            self._num_truncated += 1
        if not self.turn_ends.add(example):
            self._open_ended.append(place)
        self._store.add(kept)

    def _skip(self, reason: str, place: str, detail: str) -> None:
        self._skipped[reason] += 1
        self._skipped_example.setdefault(reason, f"{place}: {detail}")

    def finish(self) -> None:
        """Warn of what is unusual about the examples. Raises UserError when there is nothing to learn."""
        for note in self.where.notes() if self.where is not None else ():
            logger.warning(f"--where {self._options.where!r}: {note}")
        if not self._store.num_loss_tokens:
            skipped = _skipped_lines(self._skipped, self._skipped_example)
            raise UserError(f"the input holds no example to pack: {'; '.join(skipped) or 'its files are empty'}")
        self._notes.update(self._encoding.format.take_notes())  # of columns
        for note, count in self._notes.items():
            logger.info(f"note: {note} ({count:,})")
        if self._open_ended:
            logger.warning(
                f"the learned part of {counted(len(self._open_ended), 'example')} does not end with a special token "
                f"(such as {self._open_ended[0]}), so the model does not learn where an answer ends: make the token "
                f"that ends a turn a special one (tools/train_tokenizer.py --special-tokens), or correct the template"
            )

    def counts(self, packing: Packing) -> PackCounts:
        """What was read and packed."""
        num_tokens = int(self._store.lengths().sum())
        return PackCounts(
            examples=len(self._store),
            rows=packing.num_rows,
            fewest_rows=-(-num_tokens // (self._options.sequence_length + 1)),
            tokens=num_tokens,
            loss_tokens=self._store.num_loss_tokens,
            truncated=self._num_truncated,
            skipped=dict(self._skipped),
            skipped_example=self._skipped_example,
        )


def _source(path: Path, num_examples: int, status: os.stat_result, checksum: Future[str]) -> Source:
    return Source(str(path.resolve()), num_examples, status.st_size, status.st_mtime_ns, checksum.result())


def _skipped_lines(counts: Mapping[str, int], examples: Mapping[str, str]) -> list[str]:
    """How many records were skipped for each reason, and the first of them."""
    return [
        f"{count:,} skipped: {reason}" + (f" (such as {examples[reason]})" if reason in examples else "")
        for reason, count in counts.items()
    ]


def _summary(manifest: PackManifest) -> str:
    counts = manifest.counts
    first = (
        f"{counted(counts.examples, 'example')} in {counted(counts.rows, 'row')} ({manifest.efficiency:.2%} full; at "
        f"least {counts.fewest_rows:,} needed), {counts.tokens:,} tokens, {counts.loss_tokens:,} with loss"
        + (f"; {counts.truncated:,} truncated" if counts.truncated else "")
    )
    return "\n  ".join([first, *_skipped_lines(counts.skipped, counts.skipped_example)])


def _finished(prefix: Path, settings: PackSettings, tokenizer: Tokenizer, files: Sequence[Path]) -> PackManifest | None:
    """The manifest of this very index when it exists. Raises UserError when something else is in its place."""
    if not PackManifest.path(prefix).exists():
        existing = [path for kind in _KINDS if (path := Path(f"{prefix}.{kind}")).exists()]
        if existing and not is_publishing(prefix):
            raise UserError(f"{existing[0]} exists and was not made by this program; choose another --output")
        return None
    manifest = PackManifest.read(prefix)
    differences = [
        *_setting_differences(manifest, settings, tokenizer),
        *_input_differences(manifest.sources, files),
    ]
    if differences:
        raise UserError(
            f"{prefix} was packed before with other settings or input ({'; '.join(differences)}); choose another "
            f"--output, or remove {prefix}.{{bin,idx,sft,sft.json,tokenizer}} to pack again"
        )
    PackedIndex(prefix).verify()
    if not manifest.tokenizer_checksums:
        logger.warning(
            f"{prefix} was packed by an earlier version and carries no tokenizer: name it in fine-tuning "
            f"(data.tokenizer), or remove {prefix}.{{bin,idx,sft,sft.json}} to pack again"
        )
    return manifest


def _setting_differences(manifest: PackManifest, settings: PackSettings, tokenizer: Tokenizer) -> list[str]:
    before, now = asdict(manifest.settings), asdict(settings)
    if before["tokenizer_fingerprint"] != now["tokenizer_fingerprint"]:
        before["tokenizer_fingerprint"] = manifest.tokenizer.path
        now["tokenizer_fingerprint"] = tokenizer.folder.resolve()
        if str(before["tokenizer_fingerprint"]) == str(now["tokenizer_fingerprint"]):
            now["tokenizer_fingerprint"] = "the same folder with another tokenizer.json"
    return [
        f"{_LABELS.get(name) or '--' + name.replace('_', '-')}: {_short(before[name])} -> {_short(now[name])}"
        for name in now
        if before[name] != now[name]
    ]


_LABELS = {
    "tokenizer_fingerprint": "--tokenizer",
    "eos_id": "id of the end-of-sequence token",
    "columns": "columns",
    "chat_template": "checksum of the chat template",
}


def _short(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    text = str(value)
    return text[:19] if text.startswith("sha256:") else text


def _input_differences(sources: Sequence[Source], files: Sequence[Path]) -> list[str]:
    now = {str(path.resolve()): path for path in files}
    changes = compare_sources(sources, now)
    found = {
        "added to the input": changes.added,
        "removed from the input": changes.removed,
        "changed in the input": changes.changed,
    }
    differences = [f"{what}: {first_few(paths, _MAX_NAMED)}" for what, paths in found.items() if paths]
    if not differences and [source.path for source in sources] != list(now):
        differences = ["the input files are the same in another order"]
    return differences


@contextlib.contextmanager
def _interruptions_named(prefix: Path) -> Iterator[None]:
    """Say what an interrupted job leaves: nothing, since starting again is quicker than keeping half of it."""
    left = f"{prefix} was not written; the same command packs it from the start"
    try:
        with terminations_raised():
            yield
    except KeyboardInterrupt:
        logger.warning(f"interrupted: {left}")
        raise
    except Terminated:
        raise StoppedEarly(f"stopped by SIGTERM: {left}") from None
