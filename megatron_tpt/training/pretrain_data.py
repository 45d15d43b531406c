"""Pre-training data: the indexed datasets of a recipe, opened with cached sample indices.

prepare_cache(recipe)            # before the process groups: builds the sample indices, completely or not at all
data = build_pretrain_data(recipe)
"""

import functools
import hashlib
import itertools
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.source_manifests import read_manifests
from megatron_tpt.training.blend import MAX_NAMES, Blend, BlendRecipe, blends, cache_folder, check_epochs
from megatron_tpt.training.data import SourceTokens, TrainingData, make_loader, make_validation_loader
from megatron_tpt.training.pretrain_samples import DatasetConfig, MockDataset, open_blend, samples_wanted
from megatron_tpt.training.resume import TEXT
from megatron_tpt.training.sample_cache import MissingEntryError, SampleCache
from megatron_tpt.training.sample_index import epochs_of

from megatron.core.datasets.utils import Split

_MAX_MAPPED = 4096
"""Up to this many datasets, .bin files are mapped; of more, a sample opens those that it reads, since a process can
have some 65,000 maps (Linux's vm.max_map_count)."""
_MAX_SOURCES = 32_766  # Megatron Core numbers the datasets of a blend by an int16
_FILES_OF_MAPPED = 2  # the .bin file and its map
_FILES_OF_LARGE = 4  # the maps of .idx and of three arrays, if these are not small
_OTHER_FILES = 512

_Opened = tuple[list[Any], list[list[Manifest]]]
_prepared: list[tuple[BlendRecipe, _Opened]] = []
"""What `prepare_cache` has opened, and for which recipe: `build_pretrain_data` in the same process takes it, since
opening thousands of files takes seconds."""


def _dataset_config(recipe: BlendRecipe, manifest: Manifest, cache: SampleCache, *, is_mapped: bool) -> DatasetConfig:
    tokenizer = SimpleNamespace(  # the attributes that GPTDataset reads, and the think tags
        eod=manifest.tokenizer.eos_id,
        vocab_size=manifest.tokenizer.vocab_size,
        unique_identifiers={"fingerprint": manifest.tokenizer.fingerprint},
        open=manifest.think.open,
        close=manifest.think.close,
    )
    return DatasetConfig(
        random_seed=recipe.run.seed,
        sequence_length=recipe.training.sequence_length,
        # Only marks the data as real: the datasets are built below.
        blend_per_split=[([], None), None, None],
        path_to_cache=str(cache.folder),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # plain causal attention: the kernels apply the mask
        mmap_bin_files=is_mapped,
        cache=cache,
        resets_at_documents=recipe.data.reset_at_documents,
        loss_on=recipe.data.loss_on,
    )


def _raise_open_file_limit(num_datasets: int, *, is_mapped: bool) -> None:
    """Raise the limit on open files as far as the datasets may need, in addition to files that are already open.

    Raises UserError if it cannot be raised as far as they need even when all of their arrays are small.
    """
    least = (_FILES_OF_MAPPED if is_mapped else 0) * num_datasets + _OTHER_FILES + _highest_open_file()
    most = least + _FILES_OF_LARGE * num_datasets
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < most:
        if hard != resource.RLIM_INFINITY and hard < least:
            raise UserError(
                f"data: {num_datasets} datasets need {most} open files and the limit is {hard}: raise it "
                f"(ulimit -Hn {most}), or merge them with tools/merge_index.py"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _highest_open_file() -> int:
    """The highest open file descriptor, to which the limit applies, rather than to their number."""
    try:
        return max(map(int, os.listdir("/proc/self/fd")))
    except OSError:  # no /proc
        return 0


def _read_manifests(recipe: BlendRecipe, opened: list[Blend]) -> list[list[Manifest]]:
    """The manifests of each blend. Raises UserError if they do not fit the recipe."""
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


def _require_few_sources(opened: list[Blend]) -> None:
    """Raise UserError when a blend has more sources than Megatron Core can number."""
    for blend in opened:
        if len(blend.sources) > _MAX_SOURCES:
            raise UserError(
                f"data: {len(blend.sources):,} indices in the blend {blend.name}, and at most {_MAX_SOURCES:,} fit: "
                "merge them with tools/merge_index.py"
            )


def _open_splits(recipe: BlendRecipe, cache: SampleCache) -> _Opened:
    """The datasets of `open_splits`, and the manifests of their sources."""
    opened = blends(recipe)
    _require_few_sources(opened)
    manifests = _read_manifests(recipe, opened)
    num_datasets = sum(len(blend.sources) for blend in opened)
    is_mapped = num_datasets <= _MAX_MAPPED
    _raise_open_file_limit(num_datasets, is_mapped=is_mapped)
    splits = [Split.train, *[Split.valid] * (len(opened) - 1)]
    config = _dataset_config(recipe, manifests[0][0], cache, is_mapped=is_mapped)
    datasets = [open_blend(*parts, config) for parts in zip(opened, manifests, splits, strict=True)]
    return datasets, manifests


def open_splits(recipe: BlendRecipe, cache: SampleCache) -> list[Any]:
    """The training dataset and, where the recipe validates, the validation datasets."""
    return _open_splits(recipe, cache)[0]


def prepare_cache(recipe: BlendRecipe) -> None:
    """Build the sample indices that are not cached yet. One process per machine calls it, before any reads them.

    Any number of machines may do so at once, with a shared folder or one each. Needs no process group and no GPU.
    """
    if recipe.data.mock:
        return
    cache = SampleCache(cache_folder(recipe))
    _prepared.clear()
    try:
        opened = _open_splits(recipe, cache)
    except MissingEntryError:
        with cache.building():
            opened = _open_splits(recipe, cache)
    _prepared.append((recipe, opened))


def _build_mock_data(recipe: BlendRecipe) -> TrainingData:
    assert recipe.model.vocab_size is not None
    dataset = MockDataset(recipe.model.vocab_size, recipe.training.sequence_length, recipe.run.seed)
    return TrainingData(train=make_loader(dataset, recipe), validation={}, tokenizer_path=None)


def _identity(recipe: BlendRecipe, blend: Blend, manifests: list[Manifest], num_samples: int) -> dict[str, str]:
    """What determines the first `num_samples` samples: the content and share of every source in the phases up to there,
    and the epochs of each source in the whole run, since they are shuffled together."""
    remaining, phases = num_samples, []
    for phase in blend.phases:
        own = min(remaining, phase.num_samples)
        remaining -= own
        if own:
            phases.append((own, phase.weights))
    rows, epochs, texts = [], [], []
    for place, (manifest, wanted) in enumerate(zip(manifests, samples_wanted(blend), strict=True)):
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


def pretrain_identity(recipe: BlendRecipe) -> Callable[[int], dict[str, str]]:
    """A function from a number of samples to the identity of the data behind them. Reads only manifests."""
    if recipe.data.mock:
        return lambda num_samples: {}
    blend = blends(recipe)[0]
    manifests = read_manifests(source.path for source in blend.sources)
    return functools.partial(_identity, recipe, blend, manifests)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def build_pretrain_data(recipe: BlendRecipe) -> TrainingData:
    """Open the indexed datasets of a recipe, after `prepare_cache`. Needs process groups."""
    if recipe.data.mock:
        return _build_mock_data(recipe)
    prepared = [opened for of, opened in _prepared if of is recipe]
    _prepared.clear()
    opened = prepared[0] if prepared else _open_splits(recipe, SampleCache(cache_folder(recipe)))
    (train, *validation), (manifests, *_) = opened
    blend, *others = blends(recipe)
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
        identity=functools.partial(_identity, recipe, blend, manifests),
    )
