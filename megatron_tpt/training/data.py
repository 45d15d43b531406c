"""Pre-training samples: Megatron Core's GPTDataset over indexed datasets, with document and thinking tokens told apart.

prepare_cache(recipe)            # before the process groups: builds the sample indices, whole or not at all
data = build_pretrain_data(recipe)
"""

import dataclasses
import itertools
import math
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_tpt.config.recipe import DatasetSource, PretrainRecipe, TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import Manifest, read_manifests
from megatron_tpt.indexing.marks import mark_thinking
from megatron_tpt.platform.signals import ignore_stop_signals
from megatron_tpt.training.sample_cache import MissingEntryError, SampleCache
from megatron_tpt.training.sample_index import BlendIndex, SampleIndex, build_blend_index, build_sample_index

from megatron.core import parallel_state
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split, normalize

_NUM_THREADS = 16
_FILES_PER_DATASET = 8
_OTHER_FILES = 512


class ThinkingGPTDataset(GPTDataset):
    """GPTDataset whose samples say which labels are thinking: `is_thinking` bool [s] beside tokens, labels, loss_mask.

    A sample may begin in the middle of a thought; the beginning of its first document is then read too, so that the
    marks are exact wherever a sample is cut.
    """

    config: "_DatasetConfig"

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        config, lengths = self.config, self.dataset.sequence_lengths

        def build() -> SampleIndex:
            return build_sample_index(lengths, self.num_samples, config.sequence_length, config.random_seed)

        name = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        num_bytes = 4 * len(lengths) + 12 * self.num_samples
        assert config.cache is not None
        arrays = config.cache.arrays(name, self.unique_description, SampleIndex._fields, build, num_bytes)
        return arrays[0], arrays[1], arrays[2]

    def __getstate__(self) -> dict[str, Any]:
        """Without the arrays: a process that reads ahead maps them itself."""
        return {name: value for name, value in self.__dict__.items() if name not in SampleIndex._fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update(zip(SampleIndex._fields, self._build_document_sample_shuffle_indices(), strict=True))

    def _begin_of_first_document(self, idx: int) -> np.ndarray:
        sample = self.shuffle_index[idx]
        document_position, offset = self.sample_index[sample]
        if offset == 0:
            return np.zeros(0, dtype=np.int64)
        return self.dataset.get(self.document_index[document_position], offset=0, length=int(offset))

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)
        text = np.concatenate([sample["tokens"].numpy(), sample["labels"][-1:].numpy()])
        before = self._begin_of_first_document(idx or 0)
        tokenizer = self.config.tokenizer
        marks = mark_thinking(np.concatenate([before, text]), tokenizer.open, tokenizer.close, tokenizer.eod)
        sample["is_thinking"] = torch.from_numpy(marks[len(before) + 1 :])  # of the labels
        return sample


@dataclasses.dataclass
class _DatasetConfig(GPTDatasetConfig):
    """Megatron Core's settings, and where its arrays are kept."""

    cache: SampleCache | None = None


class _BlendedDataset(BlendedDataset):
    """BlendedDataset whose arrays come from our cache."""

    config: _DatasetConfig

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray]:
        def build() -> BlendIndex:
            return build_blend_index(self.weights, self.size, [len(dataset) for dataset in self.datasets])

        name = f"{self.unique_description_hash}-{type(self).__name__}-{self.split.name}"
        assert self.config.cache is not None
        arrays = self.config.cache.arrays(name, self.unique_description, BlendIndex._fields, build, 10 * self.size)
        return arrays[0], arrays[1]

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
    )


def _raise_open_file_limit(num_datasets: int) -> None:
    """Each dataset keeps two files and their maps, and the maps of three arrays, open."""
    needed = _FILES_PER_DATASET * num_datasets + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(
                f"data: {num_datasets} datasets need {needed} open files and the limit is {hard}: raise it "
                f"(ulimit -Hn {needed}), or merge them with tools/merge_index.py"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _shares(sources: list[DatasetSource], num_samples: int) -> tuple[list[float], list[int]]:
    """The normalised weight of each source, and its samples, rounded up."""
    weights = normalize([source.weight for source in sources])
    return weights, [math.ceil(num_samples * weight) for weight in weights]


@dataclasses.dataclass(frozen=True)
class _Portion:
    """What a recipe takes from the sources of one split."""

    split: Split
    sources: list[DatasetSource]
    num_samples: int


def _open_blend(portion: _Portion, manifests: list[Manifest], config: _DatasetConfig) -> torch.utils.data.Dataset:
    """One split: the dataset itself where there is one source, else the blend, as BlendedMegatronDatasetBuilder has it.

    Sources are opened by several threads, for the sake of file systems that answer slowly.
    """

    def open_source(source: DatasetSource, manifest: Manifest, num_samples: int) -> ThinkingGPTDataset:
        # An index is known by its content: elsewhere it is the same, and another in its place is not.
        content = manifest.checksums["idx"]
        dataset = ThinkingGPTDataset.build_low_level_dataset(str(source.path), config)
        return ThinkingGPTDataset(dataset, content, None, num_samples, portion.split, config)

    if len(portion.sources) == 1:
        return open_source(portion.sources[0], manifests[0], portion.num_samples)
    weights, shares = _shares(portion.sources, portion.num_samples)
    # A few more than its share: the blend rounds, and may take one more of a dataset than the share says.
    wanted = [math.ceil(share * (1 + config.mid_level_dataset_surplus)) for share in shares]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        datasets = list(threads.map(open_source, portion.sources, manifests, wanted))
    return _BlendedDataset(datasets, weights, sum(shares), config)


def _portions(recipe: PretrainRecipe) -> list[_Portion]:
    """The training split and, where the recipe validates, the validation split."""
    training, data = recipe.training, recipe.data
    portions = [_Portion(Split.train, data.train, training.num_samples(training.num_steps))]
    if data.validation and training.validation_interval:
        portions.append(_Portion(Split.valid, data.validation, training.validation_steps * training.global_batch_size))
    return portions


def open_splits(recipe: PretrainRecipe, cache: SampleCache) -> list[torch.utils.data.Dataset]:
    """The training dataset and, where the recipe validates, the validation dataset."""
    portions = _portions(recipe)
    manifests = iter(read_manifests(source.path for portion in portions for source in portion.sources))
    datasets = []
    _raise_open_file_limit(sum(len(portion.sources) for portion in portions))
    for portion in portions:
        own = list(itertools.islice(manifests, len(portion.sources)))
        config = _dataset_config(recipe, own[0], cache)
        datasets.append(_open_blend(portion, own, config))
    return datasets


def describe_data(recipe: PretrainRecipe) -> str:
    """What a recipe takes from each source, as text: documents, tokens, samples, epochs. Opens manifests alone."""
    rows = [("source", "documents", "tokens", "samples", "epochs")]
    for portion in _portions(recipe):
        manifests = read_manifests(source.path for source in portion.sources)
        _, shares = _shares(portion.sources, portion.num_samples)
        for source, manifest, share in zip(portion.sources, manifests, shares, strict=True):
            counts = manifest.counts
            epochs = share * recipe.training.sequence_length / counts.tokens
            numbers = (f"{counts.documents:,}", f"{counts.tokens:,}", f"{share:,}", f"{epochs:.2f}")
            rows.append((f"{portion.split.name} {source.path}", *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"sample indices in {cache_folder(recipe)}"])


def cache_folder(recipe: PretrainRecipe) -> Path:
    """Where the sample indices of a run are kept."""
    return recipe.data.cache_dir or recipe.data.train[0].path.parent / "cache"


def prepare_cache(recipe: PretrainRecipe) -> None:
    """Build the sample indices that are not in the cache yet. One process per machine calls it, before the others read.

    Any number of machines may do so at once, on one folder or on one each. Needs no process group and no GPU.
    """
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

    def iterate(self, first_step: int, end_step: int) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of the steps first_step ... end_step - 1, each a dictionary of tensors [b, s]. Those of
        training.skip_steps are left out."""
        batches = (
            self.sample_indices(step, microbatch)
            for step in range(first_step, end_step)
            if not self.training.skips(step + 1)
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


@dataclasses.dataclass
class TrainingData:
    """What a training program reads: a loader to train on, perhaps one to validate with, and their tokenizer."""

    train: Loader
    validation: Loader | None
    tokenizer_path: Path
    unmarked_name: str = "document"
    """What the tokens outside of thinking are called in the metrics."""
    has_segments: bool = False
    """Whether rows hold several examples that must not see each other (`segment_ids` in the batches)."""
    source_names: tuple[str, ...] = ("data",)
    """What `source` in the batches counts: losses are told apart by it."""
    identity: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the order of the samples depends on besides the recipe: a run only resumes with the same."""


def make_loader(dataset: torch.utils.data.Dataset, recipe: Any, *, validates: bool = False) -> Loader:
    """The loader of this rank. Needs process groups. Validation knows no smaller batches and skips none."""
    training = dataclasses.replace(recipe.training, batch_size_ramp=[], skip_steps=[]) if validates else recipe.training
    return Loader(
        dataset,
        training,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        recipe.data.num_workers,
    )


def build_pretrain_data(recipe: PretrainRecipe) -> TrainingData:
    """Open the indexed datasets of a recipe whose cache is prepared. Needs process groups."""
    train, *validation = open_splits(recipe, SampleCache(cache_folder(recipe)))
    tokenizer = Manifest.read(recipe.data.train[0].path).tokenizer
    return TrainingData(
        train=make_loader(train, recipe),
        validation=make_loader(validation[0], recipe, validates=True) if validation else None,
        tokenizer_path=Path(tokenizer.path),
    )
