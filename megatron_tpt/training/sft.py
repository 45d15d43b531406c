"""Fine-tuning samples: prompts and responses, several packed into a row, each seeing only itself.

The loss is on the response and the end-of-sequence token that follows it.
"""

import dataclasses
import json
from collections.abc import Iterator

import numpy as np
import torch

from megatron_tpt.config.recipe import FinetuneRecipe, SftDataConfig
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.training.data import TrainingData, make_loader, mark_thinking


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised prompt with its response."""

    tokens: np.ndarray
    """Prompt, response, end of sequence: int64 [n]."""
    num_prompt_tokens: int
    """Leading tokens without loss."""


def read_examples(config: SftDataConfig, tokenizer: Tokenizer) -> Iterator[Example]:
    """Tokenise JSON lines. Raises UserError that names the file and line of one without prompt or response."""
    for path in config.train:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would also cut at U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.train: cannot read {path}: {error}") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                prompt, response = record[config.prompt_field], record[config.response_field]
                if not (isinstance(prompt, str) and isinstance(response, str)):
                    raise TypeError
                ids = tokenizer.encode(prompt)
                tokens = np.array([*ids, *tokenizer.encode_tagged(response), tokenizer.eos_id], dtype=np.int64)
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path}:{number}: expected a JSON object with the texts {config.prompt_field!r} and "
                    f"{config.response_field!r}: mend the line, or name other fields (data.prompt_field, "
                    f"data.response_field)"
                ) from None
            yield Example(tokens, len(ids))


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Put items into as few rows of `capacity` tokens as first-fit-decreasing finds.

    Returns the positions of the items of every row. No length may exceed the capacity.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        row = next((row for row, space in enumerate(free) if space >= lengths[item]), None)
        if row is None:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(item)
        free[row] -= lengths[item]
    return rows


class PackedExamples(torch.utils.data.Dataset):
    """Rows of packed examples, epoch after epoch, each epoch in another order.

    Item i is a dictionary of tensors [s]: tokens, labels, loss_mask (1.0 where the label is a response token),
    position_ids (from 0 in every example), is_thinking (of the labels), segment_ids (1, 2, ... per example; 0 padding).
    """

    def __init__(self, examples: list[Example], tokenizer: Tokenizer, sequence_length: int, seed: int) -> None:
        self.examples = examples
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.seed = seed
        # A row holds sequence_length + 1 tokens: inputs and labels shifted by one.
        self.rows = pack([len(example.tokens) for example in examples], sequence_length + 1)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(index, len(self.rows))
        order = np.random.RandomState((self.seed + epoch) % 2**32).permutation(len(self.rows))
        return self._row(self.rows[order[place]])

    def _row(self, items: list[int]) -> dict[str, torch.Tensor]:
        size = self.sequence_length + 1
        text = np.full(size, self.tokenizer.eos_id, dtype=np.int64)
        segments, positions = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        loss_mask, thinking = np.zeros(size, dtype=np.float32), np.zeros(size, dtype=bool)
        begin = 0
        for segment, item in enumerate(items, start=1):
            example = self.examples[item]
            place = slice(begin, begin + len(example.tokens))
            text[place] = example.tokens
            segments[place] = segment
            positions[place] = np.arange(len(example.tokens))
            loss_mask[begin + example.num_prompt_tokens : place.stop] = 1.0
            thinking[place] = mark_thinking(
                example.tokens, self.tokenizer.open_ids, self.tokenizer.close_ids, self.tokenizer.eos_id
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


def _fitting(examples: list[Example], config: SftDataConfig, sequence_length: int) -> list[Example]:
    fitting = [example for example in examples if len(example.tokens) <= sequence_length + 1]
    num_too_long = len(examples) - len(fitting)
    if num_too_long and config.on_too_long == "stop":
        longest = max(len(example.tokens) for example in examples)
        raise UserError(
            f"{num_too_long} of {len(examples)} examples are longer than training.sequence_length={sequence_length} "
            f"(the longest has {longest} tokens): raise it, or give --data.on_too_long=skip"
        )
    if not fitting:
        raise UserError(f"data.train holds no example: {', '.join(map(str, config.train))}")
    return fitting


def build_sft_data(recipe: FinetuneRecipe) -> TrainingData:
    """Read, tokenise and pack the examples of a recipe. Needs process groups."""
    tokenizer = Tokenizer(recipe.tokenizer_path)
    examples = _fitting(list(read_examples(recipe.data, tokenizer)), recipe.data, recipe.training.sequence_length)
    dataset = PackedExamples(examples, tokenizer, recipe.training.sequence_length, recipe.run.seed)
    return TrainingData(
        train=make_loader(dataset, recipe),
        validation=None,
        tokenizer_path=tokenizer.folder,
        unmarked_name="answer",
        has_segments=True,
    )
