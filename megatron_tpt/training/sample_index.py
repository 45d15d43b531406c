"""Sample indices: how the documents of an indexed dataset become an endless sequence of samples, in an order that
depends on the seed.

The arrays equal those of Megatron Core's GPTDataset bit for bit, and are built by its C++ helper. Only the document
index is built differently: Megatron Core makes two copies of 8 bytes per document and epoch before it casts them to 4.
"""

from typing import NamedTuple

import numpy as np

from megatron_tpt import platform  # noqa: F401  (before Megatron Core)
from megatron_tpt.errors import UserError

from megatron.core.datasets import helpers

# If less than this share of the last epoch is used, that epoch is shuffled separately, so that all documents are seen
# equally often in the epochs before it (the threshold of GPTDataset).
_SEPARATE_BELOW = 0.80


class SampleIndex(NamedTuple):
    """The tokens of each sample."""

    document_index: np.ndarray
    """The documents of all epochs, shuffled: int32 [num_epochs * num_documents]."""
    sample_index: np.ndarray
    """Where a sample begins: position in the document index, token within the document: int32 [num_samples + 1, 2]."""
    shuffle_index: np.ndarray
    """The order of the samples: uint32 [num_samples]."""


class Epochs(NamedTuple):
    """The epochs of a sample index. Together with dataset, sequence length and seed they determine the order of its
    samples: a longer run with the same epochs begins with the samples of the shorter one."""

    number: int
    """The number of epochs, including a partial last one."""
    last_is_separate: bool
    """Whether the last epoch is shuffled separately."""


def epochs_of(num_tokens: int, num_samples: int, sequence_length: int) -> Epochs:
    """The epochs of a dataset of `num_tokens` tokens for `num_samples` samples, which overlap by one token."""
    number = max(1, -(-(num_samples * sequence_length + 1) // num_tokens))
    per_epoch = (num_tokens - 1) // sequence_length
    in_last_epoch = num_samples - _samples_before_last(num_tokens, number, sequence_length)
    return Epochs(number, number > 1 and in_last_epoch < int(_SEPARATE_BELOW * per_epoch))


def _samples_before_last(num_tokens: int, num_epochs: int, sequence_length: int) -> int:
    return ((num_epochs - 1) * num_tokens - 1) // sequence_length


def build_sample_index(sequence_lengths: np.ndarray, num_samples: int, sequence_length: int, seed: int) -> SampleIndex:
    """The sample index of a dataset for at least `num_samples` samples of `sequence_length` + 1 tokens.

    sequence_lengths: tokens of each document, int32 [num_documents]. Peak memory is 4 bytes per document, 4 per
    document and epoch, and 12 to 16 per sample.
    """
    lengths = np.array(sequence_lengths, dtype=np.int32)  # copied to memory, since they are read in random order
    num_tokens = int(lengths.sum(dtype=np.int64))
    epochs, last_is_separate = epochs_of(num_tokens, num_samples, sequence_length)

    random = np.random.RandomState(seed)
    documents = np.tile(np.arange(len(lengths), dtype=np.int32), epochs)
    _shuffle_parts(random, documents, (epochs - 1) * len(lengths) if last_is_separate else len(documents))
    samples = helpers.build_sample_idx(lengths, documents, sequence_length, epochs, num_tokens)
    total = len(samples) - 1
    order = np.arange(total, dtype=np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64)
    before_last_epoch = _samples_before_last(num_tokens, epochs, sequence_length)
    _shuffle_parts(random, order, before_last_epoch if last_is_separate else total)
    return SampleIndex(documents, samples, order)


def build_whole_index(sequence_lengths: np.ndarray, sequence_length: int) -> SampleIndex:
    """The sample index of a dataset that is read exactly once, in its own order; its last sample may be partial."""
    lengths = np.array(sequence_lengths, dtype=np.int32)
    num_tokens = int(lengths.sum(dtype=np.int64))
    documents = np.arange(len(lengths), dtype=np.int32)
    samples = helpers.build_sample_idx(lengths, documents, sequence_length, 1, num_tokens, False)
    return SampleIndex(documents, samples, np.arange(len(samples) - 1, dtype=np.uint32))


def _shuffle_parts(random: np.random.RandomState, array: np.ndarray, boundary: int) -> None:
    """Shuffle array[:boundary], then array[boundary:], in place."""
    random.shuffle(array[:boundary])
    if boundary < len(array):
        random.shuffle(array[boundary:])


class BlendIndex(NamedTuple):
    """The dataset of each sample."""

    dataset_index: np.ndarray
    """The dataset of each sample: int16 [num_samples]."""
    dataset_sample_index: np.ndarray
    """Its sample in that dataset: int64 [num_samples]."""


def build_phased_index(phases: list[tuple[list[float], int]], dataset_sizes: list[int]) -> BlendIndex:
    """Consecutive blends, each given as (shares of all datasets, number of samples). In each phase a dataset continues
    after the samples that it gave before. Raises UserError as build_blend_index does."""
    used, parts = np.zeros(len(dataset_sizes), dtype=np.int64), []
    for weights, num_samples in phases:
        present = np.flatnonzero(weights)
        sizes = (np.array(dataset_sizes) - used)[present].tolist()
        part = build_blend_index([weights[number] for number in present], num_samples, sizes)
        datasets = present[part.dataset_index]
        parts.append(BlendIndex(datasets.astype(np.int16), part.dataset_sample_index + used[datasets]))
        used += np.bincount(datasets, minlength=len(used))
    return parts[0] if len(parts) == 1 else BlendIndex(*map(np.concatenate, zip(*parts, strict=True)))


def build_blend_index(weights: list[float], num_samples: int, dataset_sizes: list[int]) -> BlendIndex:
    """The blend in which every dataset is always as close to its share as possible.

    weights: shares that sum to 1. Raises UserError when a dataset of `dataset_sizes` samples has too few.
    """
    blend = BlendIndex(np.zeros(num_samples, dtype=np.int16), np.zeros(num_samples, dtype=np.int64))
    helpers.build_blending_indices(*blend, weights, len(weights), num_samples, False)
    used = np.bincount(blend.dataset_index, minlength=len(weights))
    for number in np.flatnonzero(used > dataset_sizes):
        raise UserError(
            f"data: the blend takes {used[number]} samples of its dataset {number}, which has {dataset_sizes[number]}: "
            "raise the weights of other datasets, or give more data"
        )
    return blend
