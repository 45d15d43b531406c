"""Data loading: samples as micro-batches, in an order that depends on the seed alone."""

import dataclasses
from collections.abc import Callable, Collection, Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.platform.signals import ignore_stop_signals
from megatron_tpt.training.blend import Blend

from megatron.core import parallel_state


@dataclasses.dataclass
class Loader:
    """The micro-batches of one data-parallel rank, in an order that depends on the seed alone.

    Under any layout, a step uses the next global batch of samples. Micro-batch m of data-parallel rank r takes
    `micro_batch_size` of them, after those of earlier micro-batches and of lower ranks.
    """

    dataset: torch.utils.data.Dataset
    training: TrainingConfig
    data_parallel_rank: int
    data_parallel_size: int
    vocab_size: int
    """Of the model: what looks its tokens up."""
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
    ) -> Generator[dict[str, torch.Tensor]]:
        """The micro-batches of the steps first_step ... end_step - 1, each a dictionary of tensors [b, s]. Omits the
        steps of training.skip_steps and those in `skipped`, which are numbered from 1. Raises UserError for a token
        outside the vocabulary.

        Close the generator to end its worker processes: they ignore the signals by which Python would end them at exit,
        so that a program that leaves them running would never end.
        """
        batches = (
            self.sample_indices(step, microbatch)
            for step in range(first_step, end_step)
            if step + 1 not in skipped and not self.training.skips(step + 1)
            for microbatch in range(self.num_microbatches(step))
        )
        loaded = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),  # the workers' seeds must not be drawn from the stream that dropout uses
        )
        for batch in loaded:
            self._check_tokens(batch["tokens"], batch["labels"])
            yield batch

    def _check_tokens(self, *tensors: torch.Tensor) -> None:
        """`.bin` files are too large to compare with their checksums before every run; a token that the model does not
        have shows that one has changed. Not in the workers, whose errors reach us as tracebacks."""
        for tensor in tensors:
            lowest, highest = map(int, tensor.aminmax())
            if lowest < 0 or highest >= self.vocab_size:
                wrong = lowest if lowest < 0 else highest
                raise UserError(
                    f"the data have token {wrong}, and the model's vocabulary has {self.vocab_size:,}: a file of the "
                    f"data is damaged; find it with tools/inspect_index.py PREFIX --verify, and build it again"
                )


class _PaddedDataset(torch.utils.data.Dataset):
    """A dataset padded with samples without loss, to fill the last batch of a validation."""

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


class SourceTokens:
    """The tokens that a run has consumed from each source, and the epochs that they amount to.

    Computed from the order of the samples alone, so the same on every rank and after any resume.
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
        """Tokens by source name in the first `num_samples` samples of the run."""
        if num_samples < self._num_samples:
            self._num_samples, self._counts = 0, np.zeros_like(self._counts)
        self._counts = self._counts + self._dataset.samples_by_source(self._num_samples, num_samples)
        self._num_samples = num_samples
        return self._by_name(self._counts * self._sequence_length)

    def epochs(self, tokens: dict[str, int]) -> dict[str, float]:
        """Tokens by source name -> epochs: divided by the tokens that each source has."""
        return {name: value / self._sizes[name] for name, value in tokens.items()}


@dataclasses.dataclass
class TrainingData:
    """The data of a run: a training loader, validation loaders if any, and their tokenizer."""

    train: Loader
    validation: dict[str, ValidationLoader]
    """Validation sets, whose losses are computed separately, by name."""
    tokenizer_path: Path | None
    """None for random tokens."""
    tokenizer_fingerprint: str | None = None
    """That of the data's tokenizer; a run does not resume with another."""
    unmarked_name: str = "document"
    """The name, in metrics, of tokens that are not thinking."""
    has_segments: bool = False
    """Whether rows hold several examples that must not see each other (`segment_ids` in the batches)."""
    source_names: tuple[str, ...] = ("data",)
    """The names that `source` in the batches indexes; losses are reported for each."""
    source_tokens: SourceTokens | None = None
    """Tokens consumed from each source."""
    identity: Callable[[int], dict[str, str]] = lambda num_samples: {}
    """Identifies the data behind the first `num_samples` samples; a run only resumes with the same."""


def make_loader(dataset: torch.utils.data.Dataset, recipe: Any) -> Loader:
    """The loader of this rank. Needs process groups."""
    return Loader(
        dataset,
        recipe.training,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        recipe.model.vocab_size,
        recipe.data.num_workers,
    )


def make_validation_loader(dataset: Any, recipe: Any, *, repeats: bool = False) -> ValidationLoader:
    """The validation loader of this rank, over training.validation_steps batches or the whole dataset. Needs process
    groups. batch_size_ramp and skip_steps do not apply; the dataset is read at most once, unless it `repeats` itself
    endlessly."""
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
        recipe.model.vocab_size,
        recipe.data.num_workers,
        num_steps,
        num_samples,
        parallel.pipeline_parallel_size if parallel.virtual_pipeline_parallel_size > 1 else 1,
    )
