"""Pre-training samples: Megatron Core's GPTDataset over indexed datasets, with thinking tokens marked."""

import dataclasses
import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import torch

from megatron_tpt.config.data import DatasetSource
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.marks import begin_of_marking, mark_thinking
from megatron_tpt.indexing.pack_manifest import PackedSource
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.platform.megatron_core import indexes_blend, indexes_samples, read_small_index
from megatron_tpt.training.blend import MAX_NAMES, Blend
from megatron_tpt.training.sample_cache import SMALL_BYTES, SampleCache
from megatron_tpt.training.sample_index import (
    BlendIndex,
    SampleIndex,
    build_phased_index,
    build_sample_index,
    build_whole_index,
)

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

_NUM_THREADS = 16


class _MapsArrays:
    """A dataset that is pickled without its arrays: a process that reads ahead maps them itself."""

    array_names: ClassVar[tuple[str, ...]]

    def mapped_arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays, in the order of their names."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self.array_names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update(zip(self.array_names, self.mapped_arrays(), strict=True))


@indexes_samples
class ThinkingGPTDataset(_MapsArrays, GPTDataset):
    """GPTDataset whose samples also have `is_thinking`, bool [s], besides tokens, labels and loss_mask: which labels
    are thinking. Without `num_samples` the dataset is read exactly once; its last sample is then padded with labels
    without loss.

    A sample may begin in the middle of a thought. Its first document is then read back to where the thought begins, so
    that the marks are exact.
    """

    config: "DatasetConfig"
    array_names = SampleIndex._fields
    has_thinking = True
    """Whether the data may contain thinking."""
    packed: PackedIndex | None = None
    """The index, if it is a packed one, of which only the learned parts have a loss."""

    def sample_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        config, lengths = self.config, self.dataset.sequence_lengths

        def build() -> SampleIndex:
            if self.num_samples is None:
                return build_whole_index(lengths, config.sequence_length)
            return build_sample_index(lengths, self.num_samples, config.sequence_length, config.random_seed)

        name = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        num_bytes = 4 * len(lengths) + 12 * (self.num_samples or len(lengths))
        assert config.cache is not None
        arrays = config.cache.arrays(name, self.unique_description, SampleIndex._fields, build, num_bytes)
        return arrays[0], arrays[1], arrays[2]

    def mapped_arrays(self) -> tuple[np.ndarray, ...]:
        return self.sample_arrays()

    def _is_thinking(self, idx: int, text: np.ndarray) -> np.ndarray:
        """Which tokens of a sample are thinking: bool [s + 1]."""
        position, offset = map(int, self.sample_index[self.shuffle_index[idx]])
        document, tokenizer = self.document_index[position], self.config.tokenizer

        def read(begin: int, end: int) -> np.ndarray:
            return self.dataset.get(document, offset=begin, length=end - begin)

        begin, starts_inside = begin_of_marking(read, offset, tokenizer.open, tokenizer.close, tokenizer.eod)
        text = np.concatenate([read(begin, offset), text])
        marks = mark_thinking(text, tokenizer.open, tokenizer.close, tokenizer.eod, starts_inside=starts_inside)
        return marks[offset - begin :]

    def _is_learned(self, idx: int, packed: PackedIndex) -> np.ndarray:
        """Which tokens of a sample of a packed index are learned: bool [s + 1]; none of the padding."""
        position, offset = map(int, self.sample_index[self.shuffle_index[idx]])
        is_learned = np.zeros(self.config.sequence_length + 1, dtype=bool)
        filled = 0
        while filled < len(is_learned) and position < len(self.document_index):
            row = packed.learned(int(self.document_index[position]))[offset : offset + len(is_learned) - filled]
            is_learned[filled : filled + len(row)] = row
            position, offset, filled = position + 1, 0, filled + len(row)
        return is_learned

    def samples_by_source(self, begin: int, end: int) -> np.ndarray:
        """How many of the samples begin ... end - 1 are from each source: int64 [1]."""
        return np.array([end - begin])

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)
        is_thinking = torch.zeros(len(sample["labels"]), dtype=torch.bool)
        if self.has_thinking:
            text = np.concatenate([sample["tokens"].numpy(), sample["labels"][-1:].numpy()])
            is_thinking = torch.from_numpy(self._is_thinking(idx or 0, text)[1:])
        sample["is_thinking"] = is_thinking
        if self.packed is not None:
            sample["loss_mask"] = sample["loss_mask"] * torch.from_numpy(self._is_learned(idx or 0, self.packed)[1:])
        if self.config.loss_on != "all":
            sample["loss_mask"] = sample["loss_mask"] * (is_thinking == (self.config.loss_on == "thinking"))
        if self.config.resets_at_documents:
            sample |= segments(sample["tokens"], self.config.tokenizer.eod)
        return sample


def segments(tokens: torch.Tensor, eod: int) -> dict[str, torch.Tensor]:
    """For each token of a sample [s]: the number of its document, from 1, and its position in that document, from 0."""
    is_begin = torch.ones_like(tokens, dtype=torch.bool)
    is_begin[1:] = tokens[:-1] == eod
    places = torch.arange(len(tokens))
    begins = torch.where(is_begin, places, 0).cummax(dim=0).values
    return {"segment_ids": is_begin.cumsum(dim=0), "position_ids": places - begins}


@dataclasses.dataclass
class DatasetConfig(GPTDatasetConfig):
    """Megatron Core's settings, the cache of its arrays, and options for additional fields of samples."""

    cache: SampleCache | None = None
    resets_at_documents: bool = False
    loss_on: str = "all"


@indexes_blend
class _BlendedDataset(_MapsArrays, BlendedDataset):
    """BlendedDataset whose arrays come from our cache, whose shares may change from phase to phase, and whose samples
    have `source`, the index of their source's name among the names of the blend."""

    config: DatasetConfig
    array_names = BlendIndex._fields

    def __init__(self, datasets: list[ThinkingGPTDataset], blend: Blend, config: DatasetConfig) -> None:
        self.blend = blend
        places = {name: place for place, name in enumerate(blend.names)}
        self._names_sources = 1 < len(places) <= MAX_NAMES
        self._source_places = [places[source.shown_name] for source in blend.sources]
        shares = blend.shares
        super().__init__(datasets, _overall_weights(blend), sum(shares), config)

    def blend_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        *phases, last = self.blend.phases
        sizes = [(phase.weights, phase.num_samples) for phase in phases]
        sizes.append((last.weights if phases else self.weights, sum(self.blend.shares_of(last))))

        def build() -> BlendIndex:
            return build_phased_index(sizes, [len(dataset) for dataset in self.datasets])

        name, description = f"{self.unique_description_hash}-{type(self).__name__}-{self.split.name}", ""
        if phases:
            description = json.dumps(sizes)
            name += f"-{hashlib.sha256(description.encode()).hexdigest()[:32]}"
        assert self.config.cache is not None
        description = self.unique_description + description
        arrays = self.config.cache.arrays(name, description, BlendIndex._fields, build, 10 * self.size)
        return arrays[0], arrays[1]

    def samples_by_source(self, begin: int, end: int) -> np.ndarray:
        """How many of the samples begin ... end - 1 are from each source: int64 [num_sources]."""
        return np.bincount(self.dataset_index[begin:end], minlength=len(self.datasets))

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)
        place = self._source_places[int(sample.pop("dataset_id"))]
        return sample | {"source": torch.tensor(place)} if self._names_sources else sample

    def mapped_arrays(self) -> tuple[np.ndarray, ...]:
        return self.blend_arrays()


def _overall_weights(blend: Blend) -> list[float]:
    """The overall share of every source."""
    if len(blend.phases) == 1:
        return blend.phases[0].weights
    shares = blend.shares
    return [share / sum(shares) for share in shares]


def samples_wanted(blend: Blend) -> list[int]:
    """The samples to take from each source."""
    if len(blend.sources) == 1:
        return [sum(phase.num_samples for phase in blend.phases)]
    # A few more than its share: the blend rounds, and may take one sample more of a dataset.
    return [math.ceil(share * (1 + DatasetConfig.mid_level_dataset_surplus)) for share in blend.shares]


class _Index(IndexedDataset):
    """An indexed dataset that keeps no file open for a small .idx."""

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        super().initialize(*args, **kwargs)
        read_small_index(self, SMALL_BYTES)


def open_blend(
    blend: Blend, manifests: list[Manifest], split: Split, config: DatasetConfig
) -> torch.utils.data.Dataset:
    """One split: the dataset itself if there is one source, otherwise the blend, as with BlendedMegatronDatasetBuilder;
    for a set that is read once, its sources concatenated.

    Sources are opened by several threads, since some file systems are slow.
    """

    def open_source(source: DatasetSource, manifest: Manifest, num_samples: int | None) -> ThinkingGPTDataset:
        # An index is identified by its content, not by its path.
        content = manifest.checksums["idx"]
        dataset = _Index(str(source.path), mmap=config.mmap_bin_files)
        result = ThinkingGPTDataset(dataset, content, None, num_samples, split, config)
        result.has_thinking = manifest.may_have_thinking
        result.packed = PackedIndex(source.path) if isinstance(manifest, PackedSource) else None
        return result

    wanted = [None] * len(blend.sources) if blend.is_whole else samples_wanted(blend)
    if len(blend.sources) == 1:
        return open_source(blend.sources[0], manifests[0], wanted[0])
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        datasets = list(threads.map(open_source, blend.sources, manifests, wanted))
    return torch.utils.data.ConcatDataset(datasets) if blend.is_whole else _BlendedDataset(datasets, blend, config)


class MockDataset(torch.utils.data.Dataset):
    """Random tokens: the same sample for the same seed and index."""

    def __init__(self, vocab_size: int, sequence_length: int, seed: int) -> None:
        self.vocab_size, self.sequence_length, self.seed = vocab_size, sequence_length, seed

    def samples_by_source(self, begin: int, end: int) -> np.ndarray:
        """How many of the samples begin ... end - 1 are from each source: int64 [1]."""
        return np.array([end - begin])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random = np.random.default_rng([self.seed, index])
        text = torch.from_numpy(random.integers(self.vocab_size, size=self.sequence_length + 1))
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self.sequence_length),
            "position_ids": torch.arange(self.sequence_length),
            "is_thinking": torch.zeros(self.sequence_length, dtype=torch.bool),
        }
