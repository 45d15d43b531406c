"""Fine-tuning samples: examples packed into rows without attention between them; the loss is on the assistant's turns.

The examples come from files of prompts and responses, which are tokenized and packed at the start, or from indices that
tools/pack_sft.py has packed.
"""

import bisect
import hashlib
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from megatron_tpt.config.data import SftDataConfig
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.run import RunConfig
from megatron_tpt.config.training import SftTrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.conversations import Example, PairFormat
from megatron_tpt.indexing.example_files import read_examples
from megatron_tpt.indexing.marks import mark_thinking
from megatron_tpt.indexing.pack_manifest import is_packed
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packing import pack
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.records import expand_inputs
from megatron_tpt.training.blend import format_table
from megatron_tpt.training.data import TrainingData, make_loader, make_validation_loader
from megatron_tpt.training.data_checks import epoch_warnings, rows_per_epoch
from megatron_tpt.training.sft_mixture import MixedRows

logger = logging.getLogger(__name__)


class SftRecipe(Protocol):
    """The sections of a recipe that fine-tuning samples depend on."""

    run: RunConfig
    parallel: ParallelConfig
    training: SftTrainingConfig
    data: SftDataConfig

    @property
    def tokenizer_path(self) -> Path:
        """The folder of the tokenizer."""


class RowCounts(NamedTuple):
    """Counts over a set of rows."""

    rows: int
    examples: int
    tokens: int
    learned_tokens: int


class Rows(Protocol):
    """Rows of examples; a row has at most one token more than a sample."""

    checksum: str
    """Equal for equal rows."""
    counts: RowCounts

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> list[Example]: ...


class ExampleRows:
    """Examples in memory, packed first-fit-decreasing. No example may have more than `capacity` tokens."""

    def __init__(self, examples: Sequence[Example], capacity: int) -> None:
        self._examples = examples
        self._packing = pack(np.array([len(example.tokens) for example in examples]), capacity)
        digest = hashlib.sha256()
        for example in examples:
            digest.update(example.tokens.tobytes() + example.has_loss.tobytes())
        self.checksum = f"sha256:{digest.hexdigest()}"
        num_tokens = sum(len(example.tokens) for example in examples)
        num_learned = sum(int(example.has_loss[1:].sum()) for example in examples)
        self.counts = RowCounts(len(self), len(examples), num_tokens, num_learned)

    def __len__(self) -> int:
        return self._packing.num_rows

    def __getitem__(self, row: int) -> list[Example]:
        return [self._examples[number] for number in self._packing.row(row)]


class PackedRows:
    """The rows of a packed index."""

    def __init__(self, index: PackedIndex) -> None:
        self._index = index
        counts = index.manifest.counts
        self.checksum = ",".join(index.manifest.checksums.values())
        self.counts = RowCounts(len(index), counts.examples, counts.tokens, counts.loss_tokens)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: int) -> list[Example]:
        return self._index[row]


class JoinedRows:
    """The concatenated rows of several sets."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self.checksum = ",".join(part.checksum for part in parts)
        self.counts = RowCounts(*map(sum, zip(*(part.counts for part in parts), strict=True)))
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> list[Example]:
        part = bisect.bisect_right(self._ends, row)
        return self._parts[part][row - (self._ends[part - 1] if part else 0)]


class PackedExamples(torch.utils.data.Dataset):
    """Rows of packed examples, epoch after epoch, each epoch in a different order.

    Item i is a dictionary of tensors [s]: tokens, labels, loss_mask (1.0 where the label is learned), position_ids
    (from 0 in every example), is_thinking (of the labels), segment_ids (1, 2, ... per example; 0 padding).
    """

    def __init__(self, rows: Rows, tokenizer: Tokenizer, sequence_length: int, seed: int) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.seed = seed
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch read last

    def __len__(self) -> int:
        """The number of rows of one epoch."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(index, len(self.rows))
        if self._order is None or self._order[0] != epoch:
            random = np.random.RandomState((self.seed + epoch) % 2**32)
            self._order = epoch, random.permutation(len(self.rows))
        row = int(self._order[1][place])
        return self._row(self.rows.at(row, epoch) if isinstance(self.rows, MixedRows) else self.rows[row])

    def _row(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        size = self.sequence_length + 1  # inputs and labels are shifted by one
        text = np.full(size, self.tokenizer.eos_id, dtype=np.int64)
        segments, positions = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        loss_mask, thinking = np.zeros(size, dtype=np.float32), np.zeros(size, dtype=bool)
        begin = 0
        for segment, example in enumerate(examples, start=1):
            place = slice(begin, begin + len(example.tokens))
            text[place] = example.tokens
            segments[place] = segment
            positions[place] = np.arange(len(example.tokens))
            loss_mask[place] = example.has_loss
            loss_mask[begin] = 0.0  # the token before it belongs to another example
            thinking[place] = mark_thinking(
                text[place], self.tokenizer.open_ids, self.tokenizer.close_ids, self.tokenizer.eos_id
            )
            begin = place.stop
        return {
            "tokens": torch.from_numpy(text[:-1]),
            "labels": torch.from_numpy(text[1:]),
            "loss_mask": torch.from_numpy(loss_mask[1:]),
            "position_ids": torch.from_numpy(positions[:-1]),
            "is_thinking": torch.from_numpy(thinking[1:]),
            "segment_ids": torch.from_numpy(segments[:-1]),
        }


def _read_pairs(
    paths: Sequence[Path], config: SftDataConfig, tokenizer: Tokenizer, sequence_length: int
) -> ExampleRows:
    """Tokenize and pack the rows of files. Raises UserError with file and line of a row that is not a valid example."""
    examples: list[Example] = []
    format = PairFormat(tokenizer, config.prompt_column, config.response_column)
    for path in expand_inputs(paths):
        for number, example in read_examples(path, format):
            if not isinstance(example, Example):
                raise UserError(
                    f"{path}:{number}: {example}: fix the line, name other columns (data.prompt_column, "
                    f"data.response_column), or pack what are conversations (tools/pack_sft.py)"
                )
            examples.append(example)
    for note, count in format.take_notes().items():
        logger.info(f"note: {', '.join(map(str, paths))}: {note} ({count:,})")
    fitting = [example for example in examples if len(example.tokens) <= sequence_length + 1]
    num_too_long = len(examples) - len(fitting)
    if num_too_long and config.on_too_long == "stop":
        longest = max(len(example.tokens) for example in examples)
        raise UserError(
            f"{num_too_long} of {len(examples)} examples are longer than training.sequence_length={sequence_length} "
            f"(the longest has {longest} tokens): raise it, or give --data.on_too_long=skip"
        )
    if num_too_long:
        logger.warning(
            f"{num_too_long} of {len(examples)} examples are longer than training.sequence_length="
            f"{sequence_length} and are skipped (data.on_too_long): {', '.join(map(str, paths))}"
        )
    if not fitting:
        raise UserError(
            f"{', '.join(map(str, paths))}: no example to learn from ({len(examples)} were read): give other data, or "
            f"raise training.sequence_length where they are too long"
        )
    return ExampleRows(fitting, sequence_length + 1)


def _open_packed(prefix: Path, tokenizer: Tokenizer, sequence_length: int) -> PackedRows:
    index = PackedIndex(prefix)
    index.manifest.require(prefix, tokenizer.fingerprint, sequence_length)
    return PackedRows(index)


def _open_rows(paths: Sequence[Path], config: SftDataConfig, tokenizer: Tokenizer, sequence_length: int) -> Rows:
    """The rows of packed indices, or of files of examples."""
    if not is_packed(paths):
        return _read_pairs(paths, config, tokenizer, sequence_length)
    return JoinedRows([_open_packed(prefix, tokenizer, sequence_length) for prefix in paths])


def _open_validation(recipe: SftRecipe, tokenizer: Tokenizer) -> dict[str, Rows]:
    """The rows of each validation set, if the recipe has a validation interval."""
    data, sets = recipe.data, dict[str, list[Rows]]()
    for one in data.validation if recipe.training.validation_interval else []:
        rows = _open_rows([one.path], data, tokenizer, recipe.training.sequence_length)
        sets.setdefault(one.shown_name, []).append(rows)
    return {name: JoinedRows(parts) for name, parts in sets.items()}


def open_sets(recipe: SftRecipe, tokenizer: Tokenizer) -> tuple[Rows, dict[str, Rows]]:
    """The training rows, and the rows of every validation set by name. Raises UserError for a set without a token to
    learn from."""
    data = recipe.data
    if data.weights or data.num_examples:
        parts = [_open_packed(prefix, tokenizer, recipe.training.sequence_length) for prefix in data.train]
        train: Rows = MixedRows(parts, rows_per_epoch(data), recipe.run.seed)
    else:
        train = _open_rows(data.train, data, tokenizer, recipe.training.sequence_length)
    validation = _open_validation(recipe, tokenizer)
    named = {f"data.validation ({name})": rows for name, rows in validation.items()}
    for name, rows in ({"data.train": train} | named).items():
        if not rows.counts.learned_tokens:
            raise UserError(f"{name} has no token to learn from: give examples in which the assistant says something")
    return train, validation


def describe_examples(recipe: SftRecipe) -> tuple[str, Callable[[int], dict[str, str]]]:
    """The contents of a recipe's sets as text, and the identity of the training data (TrainingData.identity)."""
    train, validation = open_sets(recipe, Tokenizer(recipe.tokenizer_path))
    epochs = recipe.training.num_samples(recipe.training.num_steps) / len(train)
    table = [["set", *RowCounts._fields], *([name, *map(str, rows.counts)] for name, rows in validation.items())]
    table.insert(1, ["data.train", *map(str, train.counts)])
    warnings = [f"warning: {line}" for line in epoch_warnings("data.train", epochs)]
    mixed = train.describe() if isinstance(train, MixedRows) else []
    lines = [format_table(table), f"data.train is read {epochs:.2f} times", *mixed, *warnings]
    return "\n".join(lines), _identity_of(train)


def _identity_of(rows: Rows) -> Callable[[int], dict[str, str]]:
    return lambda num_samples: {"content of data.train": rows.checksum}


def build_sft_data(recipe: SftRecipe) -> TrainingData:
    """Read the examples of a recipe, or open its packed indices. Needs process groups."""
    tokenizer = Tokenizer(recipe.tokenizer_path)
    sequence_length, seed = recipe.training.sequence_length, recipe.run.seed
    rows, validation = open_sets(recipe, tokenizer)
    epochs = recipe.training.num_samples(recipe.training.num_steps) / len(rows)
    for line in epoch_warnings("data.train", epochs):
        logger.warning(line)
    return TrainingData(
        train=make_loader(PackedExamples(rows, tokenizer, sequence_length, seed), recipe),
        validation={
            name: make_validation_loader(PackedExamples(own, tokenizer, sequence_length, seed), recipe)
            for name, own in validation.items()
        },
        tokenizer_path=tokenizer.folder,
        tokenizer_fingerprint=tokenizer.fingerprint,
        unmarked_name="answer",
        has_segments=True,
        identity=_identity_of(rows),
    )
