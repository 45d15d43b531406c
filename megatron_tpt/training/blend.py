"""The share of each source in the samples, phase by phase. Imports no torch, since `--dry-run` describes it.

for blend in blends(recipe):        # the training data, then every validation set
    blend.sources, blend.phases, blend.shares
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_tpt.config.data import DataConfig, DataPhase, DatasetSource
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.run import RunConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.source_manifests import read_manifests

MAX_NAMES = 64


class BlendRecipe(Protocol):
    """The sections of a recipe that samples of indexed datasets depend on."""

    run: RunConfig
    model: ModelConfig
    parallel: ParallelConfig
    training: TrainingConfig
    data: DataConfig


def num_whole_samples(num_tokens: int, sequence_length: int) -> int:
    """Samples that hold every token of a dataset but the first once as a label; the last may be partial."""
    return max(0, -(-(num_tokens - 1) // sequence_length))


@dataclasses.dataclass(frozen=True)
class BlendPhase:
    """A number of samples, and the share of every source in them (the shares sum to 1 and may be 0)."""

    num_samples: int
    weights: list[float]


@dataclasses.dataclass(frozen=True)
class Blend:
    """The composition of one split: the sources of all phases, each listed once, and the phases."""

    name: str
    sources: list[DatasetSource]
    phases: list[BlendPhase]
    is_whole: bool = False
    """Whether every sample of every source is read exactly once; the phases then have no effect."""

    def samples(self, manifests: Sequence[Manifest], sequence_length: int) -> list[int]:
        """Samples of each source, by the manifests of the sources."""
        if not self.is_whole:
            return self.shares
        return [num_whole_samples(manifest.counts.tokens, sequence_length) for manifest in manifests]

    def shares_of(self, phase: BlendPhase) -> list[int]:
        """Samples of each source in a phase, rounded up."""
        return [math.ceil(phase.num_samples * weight) for weight in phase.weights]

    @property
    def shares(self) -> list[int]:
        """Samples of each source, rounded up in every phase."""
        return [sum(column) for column in zip(*map(self.shares_of, self.phases), strict=True)]

    @property
    def names(self) -> list[str]:
        """The names of the sources, each once."""
        return list(dict.fromkeys(source.shown_name for source in self.sources))


def _make_blend(name: str, phases: Sequence[tuple[int, list[DatasetSource]]]) -> Blend:
    """A blend of phases, each with its number of samples and its sources. Sources are identified by their paths."""
    sources: dict[Path, DatasetSource] = {}
    for source in itertools.chain.from_iterable(own for _, own in phases):
        sources.setdefault(source.path, source)
    places = {path: place for place, path in enumerate(sources)}
    blend_phases = []
    for num_samples, own in phases:
        weights = np.zeros(len(sources))
        for source in own:
            weights[places[source.path]] += source.weight
        blend_phases.append(BlendPhase(num_samples, (weights / weights.sum()).tolist()))
    return Blend(name, list(sources.values()), blend_phases)


def _phase_samples(phases: list[DataPhase], num_samples: int, sequence_length: int) -> list[int]:
    """The number of a run's samples in each phase; 0 for a phase that begins after the end."""
    ends = [min(num_samples, phase.end_sample(sequence_length) or num_samples) for phase in phases]
    return [max(0, end - begin) for begin, end in itertools.pairwise([0, *ends])]


def blends(recipe: BlendRecipe) -> list[Blend]:
    """The training blend and, where the recipe validates, one blend for every name among data.validation."""
    training, data = recipe.training, recipe.data
    phases = data.all_phases
    samples = _phase_samples(phases, training.num_samples(training.num_steps), training.sequence_length)
    result = [_make_blend("train", [(n, phase.train) for n, phase in zip(samples, phases, strict=True) if n])]
    if training.validation_interval:
        is_whole = training.validation_steps == "all"
        num_steps = 0 if training.validation_steps == "all" else training.validation_steps
        num_samples = num_steps * training.global_batch_size
        for name in dict.fromkeys(source.shown_name for source in data.validation):
            own = [source for source in data.validation if source.shown_name == name]
            result.append(dataclasses.replace(_make_blend(name, [(num_samples, own)]), is_whole=is_whole))
    return result


def check_epochs(blend: Blend, manifests: list[Manifest], sequence_length: int) -> list[float]:
    """The epochs of each source. Raises UserError when they exceed its max_epochs."""
    result = []
    for source, manifest, share in zip(
        blend.sources, manifests, blend.samples(manifests, sequence_length), strict=True
    ):
        epochs = 1.0 if blend.is_whole else share * sequence_length / manifest.counts.tokens
        if source.max_epochs is not None and epochs > source.max_epochs:
            raise UserError(
                f"data: {source.path} would be gone through {epochs:.2f} times, and its max_epochs is "
                f"{source.max_epochs:g}: lower its weight or training.num_steps, give more data, or raise max_epochs"
            )
        result.append(epochs)
    return result


def describe_data(recipe: BlendRecipe) -> str:
    """What a recipe reads from each source, as text: documents, tokens, samples, epochs. Opens only manifests."""
    if recipe.data.mock:
        return "data: random tokens (data.mock)"
    rows = [("source", "documents", "tokens", "samples", "epochs")]
    lines = []
    for blend in blends(recipe):
        manifests = read_manifests(source.path for source in blend.sources)
        all_epochs = check_epochs(blend, manifests, recipe.training.sequence_length)
        samples = blend.samples(manifests, recipe.training.sequence_length)
        for source, manifest, share, epochs in zip(blend.sources, manifests, samples, all_epochs, strict=True):
            counts = manifest.counts
            numbers = (f"{counts.documents:,}", f"{counts.tokens:,}", f"{share:,}", f"{epochs:.2f}")
            rows.append((f"{blend.name} {source.path}", *numbers))
        if len(blend.phases) > 1:
            lines.append(f"phases of {', '.join(f'{phase.num_samples:,}' for phase in blend.phases)} samples")
    return "\n".join([format_table(rows), *lines, f"sample indices in {cache_folder(recipe)}"])


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, every column flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def cache_folder(recipe: BlendRecipe) -> Path:
    """Where the sample indices of a run are kept."""
    return recipe.data.cache_dir or recipe.data.all_phases[0].train[0].path.parent / "cache"


def _cut(phases: list[DataPhase], sample: int, sequence_length: int) -> tuple[list[DataPhase], list[DataPhase]]:
    """The phases before a sample, the last of which ends there, and those after it."""
    before: list[DataPhase] = []
    for number, phase in enumerate(phases):
        end = phase.end_sample(sequence_length)
        if end is None or end >= sample:
            rest = phases[number:] if end is None or end > sample else phases[number + 1 :]
            return [*before, DataPhase(phase.train, sample * sequence_length)], rest
        before.append(phase)
    return before, []


def continue_phases(
    old: list[DataPhase], new: list[DataPhase], sample: int, sequence_length: int
) -> tuple[list[DataPhase], bool]:
    """The phases of a run that took its first `sample` samples from `old` and takes the rest from `new`, and whether
    this changes anything. A phase that continues unchanged remains one phase."""
    before, old_rest = _cut(old, sample, sequence_length)
    _, new_rest = _cut(new, sample, sequence_length)
    if old_rest == new_rest:
        return old, False
    if before and new_rest and before[-1].train == new_rest[0].train:
        before.pop()
    return [*before, *new_rest], True
