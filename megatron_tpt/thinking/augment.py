"""Augmenting: read documents, let a model think about each, write records with the thinking, in shards.

    OUTPUT/augment.json            the settings, written first; a run with other settings is refused
    OUTPUT/part-00000.jsonl.zst    records 0 .. N-1 of the input, in its order
    OUTPUT/part-00001.jsonl.zst    ...

A shard appears whole or not at all, and never changes: the same command run again after a crash does what is
missing. Requests of several shards are under way at once, so that the engine stays full while the last records of a
shard finish.
"""

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from megatron_tpt.errors import UserError
from megatron_tpt.generation import (
    Completion,
    Engine,
    EngineOptions,
    Request,
    VLLMEngine,
    check_context,
    check_model,
    derive_seed,
    load_tokenizer,
)
from megatron_tpt.records import ReadCounts, Record, expand_inputs, read_records, write_records
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.prompts import ThinkingPrompt, load_template
from megatron_tpt.thinking.settings import check_output, make_settings, write_settings


class Task(NamedTuple):
    """One document and the place of its record in the output."""

    shard: int
    position: int
    record: Record
    source: str


@dataclass
class AugmentCounts:
    """What a run has done so far."""

    records: int = 0
    shards: int = 0
    shards_skipped: int = 0
    document_tokens: int = 0
    thinking_tokens: int = 0
    truncated: int = 0
    """Thoughts cut at `max_new_tokens`."""
    empty: int = 0
    """Thoughts without a word: such a record counts as one without thinking."""
    generation_s: float = 0.0
    read: ReadCounts = field(default_factory=ReadCounts)

    def summary(self) -> str:
        """One line for the terminal."""
        rate = self.thinking_tokens / self.generation_s if self.generation_s else 0.0
        return (
            f"{self.records:,} records in {self.shards:,} shards, {self.thinking_tokens:,} thinking tokens "
            f"({self.truncated:,} cut, {self.empty:,} empty), {rate:,.0f} tokens/s"
        )


def augment(options: AugmentOptions) -> AugmentCounts:
    """Do what `tools/augment.py` does. Raises UserError for what the user can mend, before anything is written."""
    files = expand_inputs(options.input)
    template = load_template(options.prompt)
    check_model(options.model)
    settings = make_settings(options, files, template)
    check_output(options.output, settings)
    counts = AugmentCounts()
    tasks = _tasks(options, files, counts)
    first = next(tasks, None)
    if first is None:
        if not counts.read.read:
            raise UserError(f"{', '.join(map(str, options.input))}: no records to augment in the input")
        print(f"{options.output}: all {counts.shards_skipped:,} shards are there; nothing to do", file=sys.stderr)
        return counts
    prompt = ThinkingPrompt(load_tokenizer(options.model), template, options.max_document_tokens)
    context = check_context(options.model, prompt.max_tokens, options.max_new_tokens)
    engine_options = EngineOptions(
        options.model, context, options.dtype, options.tensor_parallel_size, options.max_num_seqs
    )
    print(f"starting vLLM with {options.model}", file=sys.stderr)
    with VLLMEngine(engine_options) as engine:
        write_settings(options.output, settings)
        _augment_all(engine, options, prompt, itertools.chain([first], tasks), counts)
    return counts


def _augment_all(
    engine: Engine, options: AugmentOptions, prompt: ThinkingPrompt, tasks: Iterable[Task], counts: AugmentCounts
) -> None:
    progress = _Progress(counts)
    shards = _ShardWriter(options, counts)
    for request, completion in engine.generate(_requests(options, prompt, tasks, shards)):
        task, num_document_tokens = request.key
        record = _thought_record(task, num_document_tokens, completion, options)
        counts.records += 1
        counts.document_tokens += num_document_tokens
        counts.thinking_tokens += record.meta["thinking_tokens"]
        counts.truncated += record.meta["truncated"]
        counts.empty += not record.thinking
        shards.add(task, record)
        progress.show()
    shards.finish()
    progress.show(last=True)
    for reason, number in counts.read.skipped.items():
        print(f"skipped {number:,} bad records: {reason}", file=sys.stderr)


def _tasks(options: AugmentOptions, files: Iterable[Path], counts: AugmentCounts) -> Iterator[Task]:
    """The documents whose shard is not there yet."""
    index = itertools.count()
    last_skipped = -1
    for path in files:
        records = read_records(
            [path],
            text_column=options.text_column,
            id_column=options.id_column,
            on_bad_record=options.on_bad_record,
            limit=options.limit,
            counts=counts.read,
        )
        for record in records:
            shard, position = divmod(next(index), options.records_per_shard)
            if shard == last_skipped:
                continue
            if position == 0 and shard_path(options.output, shard).exists():
                last_skipped = shard
                counts.shards_skipped += 1
                continue
            yield Task(shard, position, record, str(path))


def _requests(
    options: AugmentOptions, prompt: ThinkingPrompt, tasks: Iterable[Task], shards: "_ShardWriter"
) -> Iterator[Request]:
    sampling = options.sampling()
    for task in tasks:
        shards.expect(task)
        encoded = prompt.encode(task.record.text)
        seed = derive_seed(options.seed, task.record.id)
        yield Request(encoded.token_ids, replace(sampling, seed=seed), (task, encoded.num_document_tokens))


def _thought_record(task: Task, num_document_tokens: int, completion: Completion, options: AugmentOptions) -> Record:
    """The record x = [d; t] of one document, with how its thinking came about."""
    truncated = completion.finish_reason == "length"
    meta = task.record.meta | {
        "source": task.source,
        "generator": options.model,
        "prompt": _prompt_name(options),
        "sampling": {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
        },
        "finish_reason": completion.finish_reason,
        "document_tokens": num_document_tokens,
        # What ended the thinking is no part of it.
        "thinking_tokens": len(completion.token_ids) - (not truncated),
        "truncated": truncated,
    }
    return Record(task.record.id, task.record.text, completion.text.strip(), meta)


def _prompt_name(options: AugmentOptions) -> str:
    return "expert" if options.prompt is None else options.prompt.name


def shard_path(output: Path, shard: int) -> Path:
    """Where shard number `shard` is."""
    return output / f"part-{shard:05d}.jsonl.zst"


class _ShardWriter:
    """Collects records that finish in any order, and writes each shard when its last record is there."""

    def __init__(self, options: AugmentOptions, counts: AugmentCounts) -> None:
        self._options = options
        self._counts = counts
        self._num_expected: dict[int, int] = {}
        self._records: dict[int, dict[int, Record]] = {}

    def expect(self, task: Task) -> None:
        """Note that `task` is under way. Tasks come in the order of the shards."""
        self._num_expected[task.shard] = task.position + 1

    def add(self, task: Task, record: Record) -> None:
        records = self._records.setdefault(task.shard, {})
        records[task.position] = record
        if len(records) == self._options.records_per_shard:
            self._write(task.shard)

    def finish(self) -> None:
        """Write the last shard, which may be smaller than the others."""
        for shard in sorted(self._records):
            assert len(self._records[shard]) == self._num_expected[shard], "a request was lost"
            self._write(shard)

    def _write(self, shard: int) -> None:
        records = self._records.pop(shard)
        write_records(shard_path(self._options.output, shard), (records[i] for i in sorted(records)))
        self._counts.shards += 1


class _Progress:
    """A line on the terminal every second, or a line in a log every half minute."""

    def __init__(self, counts: AugmentCounts) -> None:
        self._counts = counts
        self._start = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._interval_s = 1.0 if self._on_terminal else 30.0
        self._next_s = self._interval_s

    def show(self, *, last: bool = False) -> None:
        elapsed_s = self._counts.generation_s = time.monotonic() - self._start
        if elapsed_s < self._next_s and not last:
            return
        self._next_s = elapsed_s + self._interval_s
        end = "\r" if self._on_terminal and not last else "\n"
        print(self._counts.summary(), end=end, file=sys.stderr, flush=True)
