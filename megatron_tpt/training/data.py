"""Pre-training samples: Megatron Core's GPTDataset over indexed datasets, with document and thinking tokens told apart.

prepare_cache(recipe)            # before the process groups: builds the sample indices, whole or not at all
data = build_pretrain_data(recipe)
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import resource
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_tpt.config.recipe import DatasetSource, PretrainRecipe, TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import Manifest, read_manifests
from megatron_tpt.indexing.marks import begin_of_marking, mark_thinking
from megatron_tpt.platform.signals import ignore_stop_signals
from megatron_tpt.training.blend import MAX_NAMES, Blend, blends, cache_folder, check_epochs
from megatron_tpt.training.resume import TEXT
from megatron_tpt.training.sample_cache import MissingEntryError, SampleCache
from megatron_tpt.training.sample_index import (
    BlendIndex,
    SampleIndex,
    build_phased_index,
    build_sample_index,
    build_whole_index,
    epochs_of,
)

from megatron.core import parallel_state
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

_NUM_THREADS = 16
_FILES_PER_DATASET = 8
_OTHER_FILES = 512


class ThinkingGPTDataset(GPTDataset):
    """GPTDataset whose samples say which labels are thinking: `is_thinking` bool [s] beside tokens, labels, loss_mask.
    Without `num_samples` it is read exactly once; its last sample is then filled up with labels that have no loss.

    A sample may begin in the middle of a thought: its first document is then read back to where the thought begins, so
    that the marks are exact wherever a sample is cut.
    """

    config: "_DatasetConfig"
    has_thinking = True
    """Whether to look for it."""

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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

    def __getstate__(self) -> dict[str, Any]:
        """Without the arrays: a process that reads ahead maps them itself."""
        return {name: value for name, value in self.__dict__.items() if name not in SampleIndex._fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update(zip(SampleIndex._fields, self._build_document_sample_shuffle_indices(), strict=True))

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
        if self.config.loss_on != "all":
            sample["loss_mask"] = sample["loss_mask"] * (is_thinking == (self.config.loss_on == "thinking"))
        if self.config.resets_at_documents:
            sample |= segments(sample["tokens"], self.config.tokenizer.eod)
        return sample


def segments(tokens: torch.Tensor, eod: int) -> dict[str, torch.Tensor]:
    """Which document of a sample each of its tokens [s] is of, from 1, and the token's place in it, from 0."""
    is_begin = torch.ones_like(tokens, dtype=torch.bool)
    is_begin[1:] = tokens[:-1] == eod
    places = torch.arange(len(tokens))
    begins = torch.where(is_begin, places, 0).cummax(dim=0).values
    return {"segment_ids": is_begin.cumsum(dim=0), "position_ids": places - begins}


@dataclasses.dataclass
class _DatasetConfig(GPTDatasetConfig):
    """Megatron Core's settings, where its arrays are kept, and what a sample is to say besides."""

    cache: SampleCache | None = None
    resets_at_documents: bool = False
    loss_on: str = "all"


class _BlendedDataset(BlendedDataset):
    """BlendedDataset whose arrays come from our cache, whose shares may change from phase to phase, and whose samples
    say which name their source has: `source`, a place among the names of the blend."""

    config: _DatasetConfig

    def __init__(self, datasets: list[ThinkingGPTDataset], blend: Blend, config: _DatasetConfig) -> None:
        self.blend = blend
        places = {name: place for place, name in enumerate(blend.names)}
        self._names_sources = 1 < len(places) <= MAX_NAMES
        self._source_places = [places[source.shown_name] for source in blend.sources]
        shares = blend.shares
        super().__init__(datasets, _overall_weights(blend), sum(shares), config)

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray]:
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

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in BlendIndex._fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update(zip(BlendIndex._fields, self._build_indices(), strict=True))


def _dataset_config(recipe: PretrainRecipe, manifest: Manifest, cache: SampleCache) -> _DatasetConfig:
    tokenizer = SimpleNamespace(  # the attributes that GPTDataset reads, and the think tags
        eod=manifest.tokenizer.eos_id,
        vocab_size=manifest.tokenizer.vocab_size,
        unique_identifiers={"fingerprint": manifest.tokenizer.fingerprint},
        open=manifest.think.open,
        close=manifest.think.close,
    )
    return _DatasetConfig(
        random_seed=recipe.run.seed,
        sequence_length=recipe.training.sequence_length,
        # Only says that the data is real: the datasets are made below.
        blend_per_split=[([], None), None, None],
        path_to_cache=str(cache.folder),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # plain causal attention: the kernels make the mask
        cache=cache,
        resets_at_documents=recipe.data.reset_at_documents,
        loss_on=recipe.data.loss_on,
    )


def _raise_open_file_limit(num_datasets: int) -> None:
    """Each dataset keeps two files and their maps, and the maps of three arrays, open, beside what is open already."""
    needed = _FILES_PER_DATASET * num_datasets + _OTHER_FILES + _highest_open_file()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(
                f"data: {num_datasets} datasets need {needed} open files and the limit is {hard}: raise it "
                f"(ulimit -Hn {needed}), or merge them with tools/merge_index.py"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _highest_open_file() -> int:
    """The limit is on the number of a file, not on how many there are."""
    try:
        return max(map(int, os.listdir("/proc/self/fd")))
    except OSError:  # no /proc
        return 0


def _overall_weights(blend: Blend) -> list[float]:
    """The share of every source in all phases together."""
    if len(blend.phases) == 1:
        return blend.phases[0].weights
    shares = blend.shares
    return [share / sum(shares) for share in shares]


def _samples_wanted(blend: Blend) -> list[int]:
    """The samples to have of each source."""
    if len(blend.sources) == 1:
        return [sum(phase.num_samples for phase in blend.phases)]
    # A few more than its share: the blend rounds, and may take one more of a dataset than the share says.
    return [math.ceil(share * (1 + _DatasetConfig.mid_level_dataset_surplus)) for share in blend.shares]


def _open_blend(
    blend: Blend, manifests: list[Manifest], split: Split, config: _DatasetConfig
) -> torch.utils.data.Dataset:
    """One split: the dataset itself where there is one source, else the blend, as BlendedMegatronDatasetBuilder has it;
    for a set that is read once, its sources one after the other.

    Sources are opened by several threads, for the sake of file systems that answer slowly.
    """

    def open_source(source: DatasetSource, manifest: Manifest, num_samples: int | None) -> ThinkingGPTDataset:
        # An index is known by its content: elsewhere it is the same, and another in its place is not.
        content = manifest.checksums["idx"]
        dataset = ThinkingGPTDataset.build_low_level_dataset(str(source.path), config)
        result = ThinkingGPTDataset(dataset, content, None, num_samples, split, config)
        result.has_thinking = manifest.may_have_thinking
        return result

    wanted = [None] * len(blend.sources) if blend.is_whole else _samples_wanted(blend)
    if len(blend.sources) == 1:
        return open_source(blend.sources[0], manifests[0], wanted[0])
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        datasets = list(threads.map(open_source, blend.sources, manifests, wanted))
    return torch.utils.data.ConcatDataset(datasets) if blend.is_whole else _BlendedDataset(datasets, blend, config)


def _read_manifests(recipe: PretrainRecipe, opened: list[Blend]) -> list[list[Manifest]]:
    """The manifests of each blend. Raises UserError where they do not suit the recipe."""
    manifests = read_manifests(source.path for blend in opened for source in blend.sources)
    unmarked = next((manifest for manifest in manifests if not manifest.append_eos), None)
    if recipe.data.reset_at_documents and unmarked is not None:
        raise UserError(
            "data.reset_at_documents needs documents that end with the end-of-sequence token: index again with it"
        )
    remaining = iter(manifests)
    parts = [list(itertools.islice(remaining, len(blend.sources))) for blend in opened]
    for blend, part in zip(opened, parts, strict=True):
        check_epochs(blend, part, recipe.training.sequence_length)
    return parts


def open_splits(recipe: PretrainRecipe, cache: SampleCache) -> list[Any]:
    """The training dataset and, where the recipe validates, the validation datasets."""
    opened = blends(recipe)
    manifests = _read_manifests(recipe, opened)
    _raise_open_file_limit(sum(len(blend.sources) for blend in opened))
    splits = [Split.train, *[Split.valid] * (len(opened) - 1)]
    config = _dataset_config(recipe, manifests[0][0], cache)
    return [_open_blend(*parts, config) for parts in zip(opened, manifests, splits, strict=True)]


def prepare_cache(recipe: PretrainRecipe) -> None:
    """Build the sample indices that are not in the cache yet. One process per machine calls it, before the others read.

    Any number of machines may do so at once, on one folder or on one each. Needs no process group and no GPU.
    """
    if recipe.data.mock:
        return
    cache = SampleCache(cache_folder(recipe))
    try:
        open_splits(recipe, cache)
    except MissingEntryError:
        with cache.building():
            open_splits(recipe, cache)


@dataclasses.dataclass
class Loader:
    """The micro-batches of one data-parallel rank, in an order that depends on the seed alone.

    Step k uses a global batch of samples under any layout, those after the batches of the steps before it;
    micro-batch m of data-parallel rank r takes `micro_batch_size` of them, after the micro-batches and ranks before it.
    """

    dataset: torch.utils.data.Dataset
    training: TrainingConfig
    data_parallel_rank: int
    data_parallel_size: int
    num_workers: int = 0

    def num_microbatches(self, step: int) -> int:
        """Micro-batches per rank in the step that follows `step` others."""
        return self.training.batch_size(step) // (self.training.micro_batch_size * self.data_parallel_size)

    def sample_indices(self, step: int, microbatch: int) -> list[int]:
        """Dataset positions of one micro-batch, [micro_batch_size]."""
        place = microbatch * self.data_parallel_size + self.data_parallel_rank
        first = self.training.num_samples(step) + place * self.training.micro_batch_size
        return list(range(first, first + self.training.micro_batch_size))

    def iterate(
        self, first_step: int, end_step: int, skipped: Collection[int] = ()
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of the steps first_step ... end_step - 1, each a dictionary of tensors [b, s]. Those of
        training.skip_steps are omitted, and of the steps in `skipped`, which are numbered from 1."""
        batches = (
            self.sample_indices(step, microbatch)
            for step in range(first_step, end_step)
            if step + 1 not in skipped and not self.training.skips(step + 1)
            for microbatch in range(self.num_microbatches(step))
        )
        return iter(
            torch.utils.data.DataLoader(
                self.dataset,
                batch_sampler=batches,
                num_workers=self.num_workers,
                pin_memory=torch.cuda.is_available(),
                persistent_workers=self.num_workers > 0,
                worker_init_fn=ignore_stop_signals,
                generator=torch.Generator(),  # its workers' seeds must not come from the stream that dropout uses
            )
        )


class _PaddedDataset(torch.utils.data.Dataset):
    """A dataset, and after its end samples without loss, as many as the last batch of a validation asks for."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index < len(self.dataset):
            return self.dataset[index]
        sample = self.dataset[0]
        return sample | {"loss_mask": torch.zeros_like(sample["loss_mask"])}


@dataclasses.dataclass
class ValidationLoader(Loader):
    """The micro-batches of one validation, the same every time. All ranks take equally many of them."""

    num_steps: int = 0
    """Global batches."""
    num_samples: int | None = None
    """Size of a set that is read at most once: the last batch is as small as it can be, and has no sample twice."""
    microbatch_multiple: int = 1
    """Micro-batches per step and rank are a multiple of this."""

    def num_microbatches(self, step: int) -> int:
        if self.num_samples is None:
            return super().num_microbatches(step)
        remaining = min(self.training.batch_size(step), self.num_samples - self.training.num_samples(step))
        per_rank = -(-remaining // (self.training.micro_batch_size * self.data_parallel_size))
        return -(-per_rank // self.microbatch_multiple) * self.microbatch_multiple


@dataclasses.dataclass
class TrainingData:
    """What a training program reads: a loader to train on, perhaps one to validate with, and their tokenizer."""

    train: Loader
    validation: dict[str, ValidationLoader]
    """Sets whose losses are measured apart, by name."""
    tokenizer_path: Path | None
    """None for random tokens."""
    tokenizer_fingerprint: str | None = None
    """Of the data: a run does not go on with another."""
    unmarked_name: str = "document"
    """What the tokens outside of thinking are called in the metrics."""
    has_segments: bool = False
    """Whether rows hold several examples that must not see each other (`segment_ids` in the batches)."""
    source_names: tuple[str, ...] = ("data",)
    """What `source` in the batches counts: losses are told apart by it."""
    source_tokens: "SourceTokens | None" = None
    """What was taken from each source."""
    identity: Callable[[int], dict[str, str]] = lambda num_samples: {}
    """What the first so many samples depend on besides the recipe: a run only resumes with the same."""


def make_loader(dataset: torch.utils.data.Dataset, recipe: Any) -> Loader:
    """The loader of this rank. Needs process groups."""
    return Loader(
        dataset,
        recipe.training,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        recipe.data.num_workers,
    )


def make_validation_loader(dataset: Any, recipe: Any, *, repeats: bool = False) -> ValidationLoader:
    """The validation loader of this rank, over training.validation_steps batches or all of the dataset. Needs process
    groups. No batch is smaller for batch_size_ramp and none is skipped; the dataset is read at most once, unless
    it `repeats` itself without end."""
    training, parallel = dataclasses.replace(recipe.training, batch_size_ramp=[], skip_steps=[]), recipe.parallel
    num_samples = None if repeats else len(dataset)
    num_steps = training.validation_steps
    if num_samples is not None:
        whole = -(-num_samples // training.global_batch_size)
        num_steps = whole if num_steps == "all" else min(num_steps, whole)
    return ValidationLoader(
        dataset if repeats else _PaddedDataset(dataset),
        training,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        recipe.data.num_workers,
        num_steps,
        num_samples,
        parallel.pipeline_parallel_size if parallel.virtual_pipeline_parallel_size > 1 else 1,
    )


class MockDataset(torch.utils.data.Dataset):
    """Random tokens: the same sample for the same seed and place."""

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


def _build_mock_data(recipe: PretrainRecipe) -> TrainingData:
    assert recipe.model.vocab_size is not None
    dataset = MockDataset(recipe.model.vocab_size, recipe.training.sequence_length, recipe.run.seed)
    return TrainingData(train=make_loader(dataset, recipe), validation={}, tokenizer_path=None)


class SourceTokens:
    """Tokens that a run has taken from each source name, and how often it has gone through them.

    Counted from the order of the samples alone: it is the same on every rank, and after any resume.
    """

    def __init__(self, dataset: Any, blend: Blend, manifests: list[Manifest]) -> None:
        self._dataset = dataset
        self._names = [source.shown_name for source in blend.sources]
        self._sequence_length = dataset.config.sequence_length
        self._sizes = self._by_name([manifest.counts.tokens for manifest in manifests])
        self._num_samples, self._counts = 0, np.zeros(len(self._names), dtype=np.int64)

    def _by_name(self, values: Iterable[int]) -> dict[str, int]:
        result = dict.fromkeys(self._names, 0)
        for name, value in zip(self._names, values, strict=True):
            result[name] += int(value)
        return result

    def after(self, num_samples: int) -> dict[str, int]:
        """Tokens by name among the first samples of the run."""
        if num_samples < self._num_samples:
            self._num_samples, self._counts = 0, np.zeros_like(self._counts)
        self._counts = self._counts + self._dataset.samples_by_source(self._num_samples, num_samples)
        self._num_samples = num_samples
        return self._by_name(self._counts * self._sequence_length)

    def epochs(self, tokens: dict[str, int]) -> dict[str, float]:
        """The same as times over the tokens that a name has."""
        return {name: value / self._sizes[name] for name, value in tokens.items()}


def _identity(recipe: PretrainRecipe, blend: Blend, manifests: list[Manifest], num_samples: int) -> dict[str, str]:
    """What decides the first `num_samples` samples: the content and share of every source in the phases until then;
    and the epochs of each in the whole run, which are shuffled together."""
    remaining, phases = num_samples, []
    for phase in blend.phases:
        own = min(remaining, phase.num_samples)
        remaining -= own
        if own:
            phases.append((own, phase.weights))
    rows, epochs, texts = [], [], []
    for place, (manifest, wanted) in enumerate(zip(manifests, _samples_wanted(blend), strict=True)):
        weights = [weights[place] for _, weights in phases]
        if any(weights):
            rows.append((manifest.checksums["idx"], weights))
            epochs.append(epochs_of(manifest.counts.tokens, wanted, recipe.training.sequence_length))
            texts.append(manifest.checksums["bin"])
    sources = [[own for own, _ in phases], rows]
    return {
        "data.train": _digest(sources),
        "number of times through data.train (training.num_steps)": _digest(epochs),
        TEXT: _digest(texts),
    }


def pretrain_identity(recipe: PretrainRecipe) -> Callable[[int], dict[str, str]]:
    """What the first samples of a recipe depend on, given their number, besides its settings. Reads manifests alone."""
    if recipe.data.mock:
        return lambda num_samples: {}
    blend = blends(recipe)[0]
    manifests = read_manifests(source.path for source in blend.sources)
    return functools.partial(_identity, recipe, blend, manifests)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def build_pretrain_data(recipe: PretrainRecipe) -> TrainingData:
    """Open the indexed datasets of a recipe whose cache is prepared. Needs process groups."""
    if recipe.data.mock:
        return _build_mock_data(recipe)
    train, *validation = open_splits(recipe, SampleCache(cache_folder(recipe)))
    blend, *others = blends(recipe)
    manifests = read_manifests(source.path for source in blend.sources)
    return TrainingData(
        train=make_loader(train, recipe),
        validation={
            other.name: make_validation_loader(dataset, recipe, repeats=not other.is_whole)
            for other, dataset in zip(others, validation, strict=True)
        },
        tokenizer_path=recipe.data.tokenizer or Path(manifests[0].tokenizer.path),
        tokenizer_fingerprint=manifests[0].tokenizer.fingerprint,
        has_segments=recipe.data.reset_at_documents,
        source_names=tuple(blend.names) if len(blend.names) <= MAX_NAMES else ("data",),
        source_tokens=SourceTokens(train, blend, manifests),
        identity=pretrain_identity(recipe),
    )
