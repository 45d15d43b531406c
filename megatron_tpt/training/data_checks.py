"""Checks of a recipe's data that need only its manifests, before anything is started. Imports no torch."""

import math
from collections.abc import Iterator, Sequence

from megatron_tpt.config.data import SftDataConfig
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.pack_manifest import PackedSource, PackManifest
from megatron_tpt.indexing.source_manifests import read_manifests
from megatron_tpt.training.blend import Blend, BlendRecipe, blends, check_epochs

# Values beyond these limits are most likely mistakes: repeating data helps for some 16 epochs at most (arXiv
# 2305.16264), and a source of which a hundredth is read could as well be a hundred times smaller.
_MANY_EPOCHS, _FEW_EPOCHS = 100.0, 0.01


def _num_learned(recipe: BlendRecipe, manifest: Manifest) -> float:
    """Tokens of an index that the loss is on; infinite if the manifest does not tell."""
    counts, loss_on = manifest.counts, recipe.data.loss_on
    if isinstance(manifest, PackedSource):
        return manifest.learned_tokens  # of which it is not known what is thinking
    if loss_on == "all":
        return max(0, counts.tokens - 1)  # the first token is not a label
    if manifest.parse_special_tokens:  # tags in raw text are not counted
        return math.inf
    return counts.thinking_tokens if loss_on == "thinking" else counts.document_tokens


def _warnings_of(recipe: BlendRecipe, blend: Blend, manifests: Sequence[Manifest]) -> Iterator[str]:
    """Warnings about the sources of a blend. Raises UserError when none has a token to learn from."""
    learned = [_num_learned(recipe, manifest) for manifest in manifests]
    name = "data.train" if blend.name == "train" else f"data.validation ({blend.name})"
    if not any(learned):
        raise UserError(
            f"{name} has no token to learn from with data.loss_on={recipe.data.loss_on}: give other data, or another "
            f"data.loss_on"
        )
    all_epochs = check_epochs(blend, list(manifests), recipe.training.sequence_length)
    for source, own, epochs in zip(blend.sources, learned, all_epochs, strict=True):
        if not own:
            yield f"{name}: {source.path} has no token to learn from with data.loss_on={recipe.data.loss_on}"
        yield from epoch_warnings(f"{name}: {source.path}", epochs)
    weights = [source.weight for source in blend.sources]
    by_tokens = [
        source.weight / manifest.counts.tokens for source, manifest in zip(blend.sources, manifests, strict=True)
    ]
    if blend.is_whole and not any(max(ratios) <= 1.01 * min(ratios) for ratios in (weights, by_tokens)):
        yield f"{name}: weights have no effect with training.validation_steps=all, which reads every source once"


def epoch_warnings(name: str, epochs: float) -> Iterator[str]:
    """A warning when a set is read far too often, or only a tiny part of it."""
    if epochs > _MANY_EPOCHS:
        yield f"{name} is read {epochs:,.0f} times: give more data, or fewer training.num_steps"
    elif epochs < _FEW_EPOCHS:
        yield f"{name}: only {epochs:.2g} of its tokens are read: if unintended, raise training.num_steps or its weight"


def blend_warnings(recipe: BlendRecipe) -> Iterator[str]:
    """Warnings about indexed datasets, one line each. Raises UserError when a blend has no token to learn from, or when
    a manifest cannot be read."""
    for blend in blends(recipe):
        yield from _warnings_of(recipe, blend, read_manifests(source.path for source in blend.sources))


def packed_warnings(data: SftDataConfig) -> Iterator[str]:
    """The same for packed examples."""
    sets = {"data.train": list(data.train)}
    for one in data.validation:
        sets.setdefault(f"data.validation ({one.shown_name})", []).append(one.path)
    for name, paths in sets.items():
        packed = [path for path in paths if PackManifest.path(path).exists()]
        learned = {path: PackManifest.read(path).counts.loss_tokens for path in packed}
        if packed == paths and not any(learned.values()):
            raise UserError(
                f"{name} has no token to learn from ({', '.join(map(str, paths))}): pack data in which the assistant "
                f"says something (tools/pack_sft.py)"
            )
        yield from (f"{name}: {path} has no token to learn from" for path, number in learned.items() if not number)


def rows_per_epoch(data: SftDataConfig) -> list[int]:
    """The rows that an epoch draws from each packed index in data.train.

    Raises UserError for what is not packed, and for so few examples that they do not fill a row.
    """
    counts = [PackManifest.read(path).counts for path in data.train]
    rows = [count.rows for count in counts]
    if data.weights:
        rows = [round(sum(rows) * weight / sum(data.weights)) for weight in data.weights]
    elif data.num_examples:
        rows = [
            round(wanted / count.examples * count.rows) for wanted, count in zip(data.num_examples, counts, strict=True)
        ]
    for path, number in zip(data.train, rows, strict=True):
        if not number:
            raise UserError(f"data.train: an epoch draws no row of {path}: raise its weight or number, or omit it")
    return rows


def is_all_packed(data: SftDataConfig) -> bool:
    """Whether everything that a fine-tuning run reads is packed."""
    paths = [*data.train, *(one.path for one in data.validation)]
    return all(PackManifest.path(path).exists() for path in paths)
