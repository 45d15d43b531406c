"""Pre-training samples: Megatron Core's GPTDataset over indexed datasets, with document and thinking tokens told apart.

prepare_cache(recipe)            # before the process groups: builds the sample indices, whole or not at all
data = build_pretrain_data(recipe)
"""

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_tpt.config.recipe import DatasetSource, PretrainRecipe
from megatron_tpt.indexing.manifest import Manifest, read_manifests

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig


def mark_thinking(tokens: np.ndarray, opening: list[int], closing: list[int], eos_id: int) -> np.ndarray:
    """True for every token between the think tags, tags included.

    tokens [n] must begin outside of thinking. A document's end (EOS) ends an open thought too. Returns bool [n].
    """
    # Position i of `event` says what begins at token i: 1 thinking, 2 the document; the last event counts.
    event = np.zeros(len(tokens) + 1, dtype=np.int8)
    event[np.flatnonzero(tokens == eos_id) + 1] = 2
    event[_find(tokens, closing) + len(closing)] = 2
    event[_find(tokens, opening)] = 1
    last_event = np.maximum.accumulate(np.where(event > 0, np.arange(len(event)), 0))
    return event[last_event][:-1] == 1


def _find(tokens: np.ndarray, pattern: list[int]) -> np.ndarray:
    """Positions in tokens [n] at which `pattern` begins."""
    num_places = len(tokens) - len(pattern) + 1
    if num_places <= 0:
        return np.zeros(0, dtype=np.int64)
    found = np.ones(num_places, dtype=bool)
    for offset, token in enumerate(pattern):
        found &= tokens[offset : offset + num_places] == token
    return np.flatnonzero(found)


class ThinkingGPTDataset(GPTDataset):
    """GPTDataset whose samples say which labels are thinking: `is_thinking` bool [s] beside tokens, labels, loss_mask.

    A sample may begin in the middle of a thought; the beginning of its first document is then read too, so that the
    marks are exact wherever a sample is cut.
    """

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


def _dataset_config(recipe: PretrainRecipe, cache_dir: Path) -> GPTDatasetConfig:
    manifest = read_manifests(source.path for source in recipe.data.train + recipe.data.validation)[0]
    tokenizer = SimpleNamespace(  # the attributes that GPTDataset reads, and the think tags
        eod=manifest.tokenizer.eos_id,
        vocab_size=manifest.tokenizer.vocab_size,
        unique_identifiers={"fingerprint": manifest.tokenizer.fingerprint},
        open=manifest.think.open,
        close=manifest.think.close,
    )

    def blend(sources: list[DatasetSource]) -> tuple[list[str], list[float]] | None:
        return ([str(s.path) for s in sources], [s.weight for s in sources]) if sources else None

    return GPTDatasetConfig(
        random_seed=recipe.run.seed,
        sequence_length=recipe.training.sequence_length,
        blend_per_split=[blend(recipe.data.train), blend(recipe.data.validation), None],
        path_to_cache=str(cache_dir),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # plain causal attention: the kernels make the mask
    )


def _build_splits(recipe: PretrainRecipe, cache_dir: Path) -> list[Any]:
    training = recipe.training
    validation_samples = training.validation_steps * training.global_batch_size
    sizes = [
        training.num_steps * training.global_batch_size,
        validation_samples if recipe.data.validation and training.validation_interval else None,
        None,
    ]
    config = _dataset_config(recipe, cache_dir)
    if sizes[1] is None:
        config.blend_per_split[1] = None
    return BlendedMegatronDatasetBuilder(ThinkingGPTDataset, sizes, lambda: True, config).build()


def cache_folder(recipe: PretrainRecipe) -> Path:
    """Where the sample indices of a run are kept."""
    return recipe.data.cache_dir or recipe.data.train[0].path.parent / "cache"


def prepare_cache(recipe: PretrainRecipe) -> None:
    """Build the sample indices that are not in the cache yet. One process per machine calls it, before the others read.

    Megatron Core writes its cache in place, so that a killed job leaves a short file that later counts as a hit. Here
    it writes into a folder of its own, which first gets links to what is there, and each new file is renamed into the
    cache when all are whole; the description, by which a set of files counts as complete, comes last. Any number of
    machines may do so at once. Needs no process group and no GPU.
    """
    cache = cache_folder(recipe)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as staging:
        for description in cache.glob("*-description.txt"):
            for path in cache.glob(description.name.removesuffix("description.txt") + "*"):
                os.link(path, Path(staging, path.name))
        known = {path.name for path in Path(staging).iterdir()}
        _build_splits(recipe, Path(staging))
        new = [path for path in Path(staging).iterdir() if path.name not in known]
        for path in sorted(new, key=lambda path: path.name.endswith("description.txt")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(path, cache / path.name)


@dataclasses.dataclass
class Loader:
    """The micro-batches of one data-parallel rank, in an order that depends on the seed alone.

    Step k uses the samples k * G ... (k + 1) * G - 1 of the dataset (G: global batch size) under any layout;
    micro-batch m of data-parallel rank r takes `micro_batch_size` of them, after the micro-batches and ranks before it.
    """

    dataset: torch.utils.data.Dataset
    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    num_workers: int = 0

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per step and rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def sample_indices(self, step: int, microbatch: int) -> list[int]:
        """Dataset positions of one micro-batch, [micro_batch_size]."""
        place = microbatch * self.data_parallel_size + self.data_parallel_rank
        first = step * self.global_batch_size + place * self.micro_batch_size
        return list(range(first, first + self.micro_batch_size))

    def iterate(self, first_step: int, end_step: int) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of the steps first_step ... end_step - 1, each a dictionary of tensors [b, s]."""
        batches = (
            self.sample_indices(step, microbatch)
            for step in range(first_step, end_step)
            for microbatch in range(self.num_microbatches)
        )
        return iter(
            torch.utils.data.DataLoader(
                self.dataset,
                batch_sampler=batches,
                num_workers=self.num_workers,
                pin_memory=torch.cuda.is_available(),
                persistent_workers=self.num_workers > 0,
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


def make_loader(dataset: torch.utils.data.Dataset, recipe: Any) -> Loader:
    """The loader of this rank. Needs process groups."""
    return Loader(
        dataset,
        recipe.training.global_batch_size,
        recipe.training.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        recipe.data.num_workers,
    )


def build_pretrain_data(recipe: PretrainRecipe) -> TrainingData:
    """Open the indexed datasets of a recipe whose cache is prepared. Needs process groups."""
    train, validation, _ = _build_splits(recipe, cache_folder(recipe))
    tokenizer = Manifest.read(recipe.data.train[0].path).tokenizer
    return TrainingData(
        train=make_loader(train, recipe),
        validation=make_loader(validation, recipe) if validation is not None else None,
        tokenizer_path=Path(tokenizer.path),
    )
