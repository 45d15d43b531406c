"""Examples from files of any kind that `megatron_tpt.records` reads. Everything streams."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.chat_shapes import ChatColumns, has_later_turns
from megatron_tpt.indexing.chat_values import messages_in
from megatron_tpt.indexing.conversations import BadExample, Example, ExampleFormat
from megatron_tpt.indexing.selection import NOT_SELECTED
from megatron_tpt.records import DAMAGED, Source, describe, read_rows
from megatron_tpt.records.parsing import meta_of_row
from megatron_tpt.records.record import BadRecord, question_and_answer
from megatron_tpt.records.where import Where

_ROWS_PER_BATCH = 256
_BYTES_PER_BATCH = 4 << 20


class FieldBatch(NamedTuple):
    """Consecutive records of a file."""

    path: Path
    records: list[tuple[int, dict[str, Any] | BadExample]]
    """Number in the file, from 1, and fields, or what is wrong with the line."""
    unselected: Counter[str]
    """Records that `where` does not select, before and among these."""

    def __str__(self) -> str:
        return f"{self.path}:{self.records[0][0]}-{self.records[-1][0]}" if self.records else str(self.path)


class EncodedBatch(NamedTuple):
    """The results of a batch."""

    outcomes: list[tuple[int, list[Example] | BadExample]]
    """Number and examples of every record, or what is wrong with it."""
    notes: Counter[str]
    """Which parts of the records had no effect, in words, with the number of records."""


def read_examples(path: Path, format: ExampleFormat) -> Iterator[tuple[int, Example | BadExample]]:
    """Number (from 1) and examples, or what is wrong, of every line or row of a file. Blank lines are skipped.

    The notes are left with `format`.
    """
    for batch in read_batches(path, format):
        for number, outcome in _outcomes(batch, format):
            for one in [outcome] if isinstance(outcome, BadExample) else outcome:
                yield number, one


def read_batches(path: Path, format: ExampleFormat, where: Where | None = None) -> Iterator[FieldBatch]:
    """The records of a file whose `meta` meets `where`, in batches of bounded size. Blank lines are skipped."""
    batch = FieldBatch(path, [], Counter())
    num_bytes = 0
    for number, fields, size in _read_fields(path, format):
        if not isinstance(fields, BadExample):
            try:
                meta = meta_of_row(fields)
            except BadRecord as bad:
                fields = BadExample(bad.problem, bad.detail)
            else:
                if where is not None and not where.matches(meta):
                    batch.unselected[NOT_SELECTED] += 1
                    continue
                fields = _with_fields_of_meta(fields, meta, format)
        batch.records.append((number, fields))
        num_bytes += size
        if num_bytes >= _BYTES_PER_BATCH or len(batch.records) >= _ROWS_PER_BATCH:
            yield batch
            batch, num_bytes = FieldBatch(path, [], Counter()), 0
    if batch.records or batch.unselected:
        yield batch


def encode_batch(batch: FieldBatch, format: ExampleFormat) -> EncodedBatch:
    """The result of every record of a batch."""
    return EncodedBatch(_outcomes(batch, format), format.take_notes())


def _outcomes(batch: FieldBatch, format: ExampleFormat) -> list[tuple[int, list[Example] | BadExample]]:
    encoded = iter(format.encode_batch([fields for _, fields in batch.records if not isinstance(fields, BadExample)]))
    return [(number, fields if isinstance(fields, BadExample) else next(encoded)) for number, fields in batch.records]


def _read_fields(path: Path, format: ExampleFormat) -> Iterator[tuple[int, dict[str, Any] | BadExample, int]]:
    """Number, fields and about the size in characters of every line or row."""
    source = Source(str(path), None, path)
    for row in read_rows(source, lambda names: (*format.choose_columns(names), *({"meta"} & {*names}))):
        if row.problem == DAMAGED:
            raise UserError(describe(source, row))
        if row.value is None:
            yield row.number + 1, BadExample(str(row.problem), row.detail.removeprefix("(").removesuffix(")")), 0
        else:
            yield row.number + 1, row.value, _num_characters(row.value)


def _with_fields_of_meta(
    fields: dict[str, Any], meta: dict[str, Any], format: ExampleFormat
) -> dict[str, Any] | BadExample:
    """A record's fields with those that a curated one (tools/curate.py) keeps in `meta`: the conversation with what
    belongs to it; and the question and the answer, which together are its text: the question ends with the newline
    between both, as the model reads it in pretraining."""
    found = {name: meta[name] for name in ("messages", *ChatColumns().extra) if name in meta}
    text = fields.get("text")
    asks = bool({"question", "answer"} & {*format.columns})
    if asks and isinstance(text, str) and (parts := question_and_answer(text, meta)):
        if has_later_turns(messages_in(meta.get("messages")) or ()):
            return BadExample(
                "several turns",
                "behind the first answer are messages of others, which would be learned: pack such conversations with "
                "a chat template, without --prompt-column and --response-column",
            )
        _, answer = parts
        found |= {"question": text.removesuffix(answer), "answer": answer}
    if not found:
        return fields
    used = {"meta", *({"text"} if {"messages", "question"} & found.keys() else ())} - {*format.columns}
    return {**found, **{name: value for name, value in fields.items() if name not in used}}


def _num_characters(value: Any) -> int:
    """Characters in all strings of a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list) else 0
