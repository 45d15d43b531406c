"""Examples to a packed index: the job behind `tools/pack_sft.py`.

The examples are tokenised once into a hidden folder beside the output, in the order of the input; then they are placed,
and copied row by row. Memory holds some 200 bytes per example. A killed run leaves only that folder, which the next run
of the same command clears away.
"""

import os
import sys
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Self

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.files import sync_tree
from megatron_tpt.indexing.conversations import ConversationFormat, Example, PairFormat
from megatron_tpt.indexing.example_files import read_examples
from megatron_tpt.indexing.example_formats import choose_format
from megatron_tpt.indexing.journal import working_folder, working_path
from megatron_tpt.indexing.manifest import Source, TokenizerInfo, file_checksum
from megatron_tpt.indexing.packing import (
    PackCounts,
    PackedIndex,
    Packing,
    PackManifest,
    PackSettings,
    pack,
    write_boundaries,
)
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.indexing.writer import IndexWriter, token_dtype
from megatron_tpt.records import expand_inputs

_REPORT_EVERY_S = 10.0
_KINDS = ("bin", "idx", "sft")


def pack_sft(options: PackOptions) -> PackManifest:
    """Pack `options.input` into `options.output`.{bin,idx,sft,sft.json} and return the manifest.

    When that very index is there already, its checksums are verified and it is left alone. Raises UserError for bad
    input, for an output of other settings or of other hands, and when no example is left; then nothing new is there.
    """
    files = expand_inputs(options.input)
    tokenizer = Tokenizer(options.tokenizer)
    format, template, loss_mask = choose_format(options, tokenizer)
    settings = PackSettings(
        tokenizer_fingerprint=tokenizer.fingerprint,
        eos_id=tokenizer.eos_id,
        columns=format.columns,
        chat_template=template.checksum if template is not None else None,
        date=options.date,
        sequence_length=options.sequence_length,
        on_too_long=options.on_too_long,
        on_bad_example=options.on_bad_example,
        chat_template_kwargs=options.template_variables(),
        tools_column=options.tools_column,
        inline_reasoning=options.inline_reasoning,
        ignore_fields=tuple(options.ignore_fields),
    )
    if (finished := _finished(options.output, settings, files)) is not None:
        print(f"{options.output}: already done and whole; {_summary(finished)}")
        return finished
    with (
        working_folder(options.output) as folder,
        _ExampleStore(folder / "examples", tokenizer.vocab_size) as store,
    ):
        reader = _Reader(options, format, store)
        sources = [reader.add_file(path) for path in files]
        reader.finish()
        packing = pack(store.lengths(), options.sequence_length + 1)
        checksums = store.write_packed(packing, folder)
        counts = reader.counts(packing)
        manifest = PackManifest(
            settings=settings,
            tokenizer=TokenizerInfo.of(tokenizer),
            sources=sources,
            counts=counts,
            efficiency=counts.efficiency(options.sequence_length),
            loss_mask=loss_mask,
            checksums=checksums,
            command=sys.argv,
        )
        _publish(folder, options.output, manifest)
    print(f"{options.output}: {_summary(manifest)}")
    return manifest


def _summary(manifest: PackManifest) -> str:
    counts = manifest.counts
    skipped = "".join(f"; {count:,} skipped ({reason})" for reason, count in counts.skipped.items())
    return (
        f"{counts.examples:,} examples in {counts.rows:,} rows ({manifest.efficiency:.2%} full, at least "
        f"{counts.fewest_rows:,} rows are needed), {counts.tokens:,} tokens, {counts.loss_tokens:,} with loss"
        + (f"; {counts.truncated:,} truncated" if counts.truncated else "")
        + skipped
    )


class _ExampleStore:
    """Examples in the order of the input: tokens in a file, lengths and runs of the loss mask in memory."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._path = path
        self._vocab_size = vocab_size
        self._dtype = numpy.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._file = path.open("wb", buffering=1 << 20)
        self._lengths, self._num_runs, self._runs = array("i"), array("i"), array("i")
        self.num_loss_tokens = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, example: Example) -> None:
        """Append an example."""
        self._file.write(example.tokens.astype(self._dtype).tobytes())
        changes = numpy.flatnonzero(numpy.diff(example.has_loss)) + 1  # the first token never has loss
        runs = numpy.diff(changes, prepend=0, append=len(example.tokens))
        self._lengths.append(len(example.tokens))
        self._num_runs.append(len(runs))
        self._runs.extend(runs.tolist())
        self.num_loss_tokens += int(example.has_loss.sum())

    def lengths(self) -> numpy.ndarray:
        """Tokens of each example, [n]."""
        return numpy.array(self._lengths, dtype=numpy.int64)

    def write_packed(self, packing: Packing, folder: Path) -> dict[str, str]:
        """Write the files of the packed index and drop the store's own. Returns the checksums."""
        self._file.flush()
        tokens = numpy.memmap(self._path, mode="r", dtype=self._dtype)
        ends = numpy.cumsum(self.lengths())
        begins = ends - self.lengths()
        writer = IndexWriter(folder / "bin", folder / "idx", self._vocab_size)
        with writer:
            for number in range(packing.num_rows):
                row = packing.row(number)
                writer.add_document(numpy.concatenate([tokens[begins[i] : ends[i]] for i in row]))
        num_runs, runs = (numpy.array(values, dtype=numpy.int64) for values in (self._num_runs, self._runs))
        packed_num_runs = num_runs[packing.order]
        run_bounds = numpy.concatenate([[0], numpy.cumsum(packed_num_runs)])
        # Where each run was, from where it is: its example's runs have moved together.
        moves = (numpy.cumsum(num_runs) - num_runs)[packing.order] - run_bounds[:-1]
        packed_runs = runs[numpy.arange(len(runs)) + numpy.repeat(moves, packed_num_runs)]
        write_boundaries(folder / "sft", packing.bounds, run_bounds, packed_runs)
        self._path.unlink()
        return {**writer.checksums(), "sft": file_checksum(folder / "sft")}


class _Reader:
    """Moves the examples of files into a store, and counts what becomes of them."""

    def __init__(self, options: PackOptions, format: PairFormat | ConversationFormat, store: _ExampleStore) -> None:
        self._options = options
        self._format = format
        self._store = store
        self._skipped: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self._num_truncated = 0
        self._num_open_ended = 0
        self._last_report = time.monotonic()

    def add_file(self, path: Path) -> Source:
        """Read one file to its end."""
        status, before = path.stat(), len(self._store)
        with ThreadPoolExecutor(max_workers=1) as beside:  # hashing lets go of the interpreter lock
            checksum = beside.submit(file_checksum, path)
            for number, example in read_examples(path, self._format):
                if isinstance(example, Example):
                    self._add(f"{path}:{number}", example)
                elif self._options.on_bad_example == "skip":
                    self._skipped[example.reason] += 1
                else:
                    raise UserError(f"{path}:{number}: {example}; or leave such out with --on-bad-example skip")
                self._report()
        self._notes.update(self._format.take_notes())
        num_examples = len(self._store) - before
        return Source(str(path.resolve()), num_examples, status.st_size, status.st_mtime_ns, checksum.result())

    def _add(self, place: str, example: Example) -> None:
        capacity = self._options.sequence_length + 1
        if isinstance(self._format, ConversationFormat) and not self._format.ends_its_turn(example):
            self._num_open_ended += 1
        if len(example.tokens) > capacity:
            if self._options.on_too_long == "stop":
                raise UserError(
                    f"{place}: {len(example.tokens)} tokens, a row holds {capacity}: raise --sequence-length, or give "
                    f"--on-too-long skip or truncate"
                )
            cut = Example(example.tokens[:capacity], example.has_loss[:capacity])
            if self._options.on_too_long == "skip" or not cut.has_loss.any():
                self._skipped["too long"] += 1
                return
            self._num_truncated += 1
            example = cut
        self._store.add(example)

    def _report(self) -> None:
        if time.monotonic() - self._last_report >= _REPORT_EVERY_S:
            self._last_report = time.monotonic()
            print(f"{len(self._store):,} examples read", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Say what is odd about the examples. Raises UserError when there is none."""
        if len(self._store) == 0:
            skipped = ", ".join(f"{reason}: {count}" for reason, count in self._skipped.items())
            raise UserError(f"the input holds no example to pack ({skipped or 'its files are empty'})")
        for note, count in self._notes.items():
            print(f"note: {note} ({count:,})", file=sys.stderr)
        if self._num_open_ended:
            print(
                f"warning: the learned part of {self._num_open_ended:,} examples does not end with a special token: "
                f"the model does not learn where an answer ends; mend the chat template's {{% generation %}} spans",
                file=sys.stderr,
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
        )


def _finished(prefix: Path, settings: PackSettings, files: Sequence[Path]) -> PackManifest | None:
    """The manifest of this very index when it exists. Raises UserError when something else is in its place."""
    manifest_path = PackManifest.path(prefix)
    existing = [path for kind in _KINDS if (path := Path(f"{prefix}.{kind}")).exists()]
    if not manifest_path.exists():
        if existing and not working_path(prefix).exists():  # else a killed run was moving them into place
            raise UserError(f"{existing[0]} exists and was not made by this program; choose another --output")
        return None
    manifest = PackManifest.read(prefix)
    found, wanted = asdict(manifest.settings), asdict(settings)
    differences = [name.replace("_", " ") for name in wanted if found[name] != wanted[name]]
    if [source.path for source in manifest.sources] != [str(file.resolve()) for file in files]:
        differences.append("list of input files")
    elif not all(map(Source.is_still, manifest.sources, files)):
        differences.append("content of the input files")
    if differences:
        raise UserError(
            f"{prefix} was packed before with another {', '.join(differences)}; choose another --output or remove "
            f"{prefix}.{{bin,idx,sft,sft.json}}"
        )
    PackedIndex(prefix).verify()
    return manifest


def _publish(folder: Path, prefix: Path, manifest: PackManifest) -> None:
    """Flush the finished files to the disk and move them to their names, the manifest last."""
    sync_tree(folder)
    for kind in _KINDS:
        os.replace(folder / kind, f"{prefix}.{kind}")
    manifest.write(prefix)
