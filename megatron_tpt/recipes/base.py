"""Base class of all kinds of runs: resolves and checks a recipe, finds the tokenizer and opens the data."""

import abc
import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron_tpt.config.convert import expand_path
from megatron_tpt.config.effects import without_effect
from megatron_tpt.config.layout import check_layout
from megatron_tpt.config.load import read_yaml
from megatron_tpt.config.model import DEFAULT_FAMILY, spec_named
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.config.yaml_file import Key
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import TokenizerInfo
from megatron_tpt.training.checkpoint_files import checkpoint_named
from megatron_tpt.training.history import with_batches_of_run
from megatron_tpt.training.resume import DataIdentity

if TYPE_CHECKING:  # these import torch
    from megatron_tpt.training.data import TrainingData
    from megatron_tpt.training.trainer import Callback, Trainer

NO_DATA = "data.train is empty: give the training data"
"""What is wrong with a recipe without training data."""


@dataclass
class TrainingRecipe(Recipe, abc.ABC):
    """A recipe that a training program runs. Subclasses define the data; everything else is common to all."""

    @classmethod
    def kinds(cls) -> Sequence[type[Recipe]]:
        from megatron_tpt.recipes import recipe_types

        return recipe_types()

    @classmethod
    def complete(cls, raw: dict[str, Any]) -> None:
        """Fill in the fields of the model that are not given, from model.preset or the checkpoint to start from."""
        _fill_in_preset(raw)
        _take_shape_of_checkpoint(raw)

    @abc.abstractmethod
    def read_tokenizer(self) -> TokenizerInfo | None:
        """The tokenizer of the data; None for random tokens. Raises UserError when either is missing."""

    @abc.abstractmethod
    def check_data(self) -> None:
        """Raise UserError for invalid settings of the data, without reading any data."""

    @abc.abstractmethod
    def missing_data(self) -> list[Path]:
        """Files of the data that are missing."""

    @abc.abstractmethod
    def data_warnings(self) -> Iterator[str]:
        """Warnings about the data, one line each. Raises UserError when a set has no token to learn from, or when its
        manifests cannot be read."""

    @abc.abstractmethod
    def describe_data(self) -> tuple[str, DataIdentity]:
        """A description of the data, and its identity, which must be unchanged on resume. Raises UserError for data
        that would be refused."""

    def prepare_data(self) -> None:
        """Called by one process of every machine before any process opens the data. Needs no process groups."""

    @abc.abstractmethod
    def build_data(self) -> "TrainingData":
        """Open the data. Needs process groups."""

    def train(self) -> "Trainer":
        """Train until the last step. Returns the trainer. Needs process groups."""
        from megatron_tpt.training.builder import build_trainer
        from megatron_tpt.training.starts import record_start

        trainer = build_trainer(self, self.build_data(), self.build_callbacks())
        record_start(self, trainer.global_step)
        trainer.fit()
        return trainer

    @abc.abstractmethod
    def next_steps(self, num_tokens: int) -> str:
        """The message after all steps are done, on `num_tokens` tokens."""

    def build_callbacks(self) -> "list[Callback]":
        """The callbacks of the training loop."""
        from megatron_tpt.training.recipe_callbacks import build_callbacks

        return build_callbacks(self.callbacks)

    def check_callbacks(self, places: dict[Key, str]) -> None:
        """Raise UserError for unknown callbacks and invalid settings, each with its place from `places`.

        Imports the modules that the recipe names: call it only for the recipe that a user runs, not for that of a
        checkpoint.
        """
        if self.callbacks:
            from megatron_tpt.training.recipe_callbacks import read_callbacks

            read_callbacks(self.callbacks, places)

    def tokenizer(self, *, needs_data: bool = True) -> TokenizerInfo | None:
        """The tokenizer of the data; None for random tokens.

        Raises UserError when the data or the tokenizer is missing; without `needs_data` returns None instead, if the
        recipe gives the vocabulary size.
        """
        try:
            return self.read_tokenizer()
        except UserError:
            if needs_data or self.model.vocab_size is None:
                raise
            return None

    def resolve(self) -> Self:
        """The recipe with all fields set that follow from its run folder and its data, except the vocabulary size."""
        return with_batches_of_run(self)

    def with_vocabulary(self, tokenizer: TokenizerInfo | None) -> Self:
        """The recipe with the vocabulary size of its data's tokenizer, if the recipe gives none, or only takes over the
        smaller one of the checkpoint to start from.

        Raises UserError when the tokenizer has more tokens than the recipe's model.
        """
        model, start = self.model, self.training.init_from
        if tokenizer is None:
            return self
        before = _vocab_size_of(start) if start is not None else None
        if before is not None and model.vocab_size is not None and model.vocab_size < before:
            raise UserError(
                f"model.vocab_size={model.vocab_size} is smaller than that of training.init_from={start} ({before}), "
                f"whose last tokens would be lost: omit it"
            )
        grows = before is not None and model.vocab_size == before
        if model.vocab_size is None or (grows and model.vocab_size < tokenizer.vocab_size):
            return dataclasses.replace(self, model=dataclasses.replace(model, vocab_size=tokenizer.vocab_size))
        if model.vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"model.vocab_size={model.vocab_size} is smaller than the data's tokenizer ({tokenizer.vocab_size} "
                f"tokens): raise it, or omit it"
            )
        return self

    def check(self, world_size: int) -> None:
        """Raise UserError for combinations of settings that cannot run, or a layout that does not fit `world_size`
        processes.
        """
        check_layout(self, world_size)
        if beyond := [rank for rank in self.profiling.ranks if rank >= world_size]:
            raise UserError(f"profiling.ranks: there is no rank {beyond[0]} among {world_size} processes: remove it")
        for package in ("wandb", "trackio"):
            if getattr(self.logging, f"{package}_project") is not None and importlib.util.find_spec(package) is None:
                raise UserError(
                    f"logging.{package}_project needs the package {package}: pip install {package}, or omit the project"
                )
        self.check_data()
        self._check_validation()

    def _check_validation(self) -> None:
        """Refuse a validation interval without data, and validation data without an interval."""
        interval, sets = self.training.validation_interval, self.data.validation
        if interval and not sets:
            raise UserError(
                f"training.validation_interval={interval} has nothing to validate with: give data.validation, or "
                f"--training.validation_interval=0"
            )
        if sets and not interval:
            raise UserError(
                f"data.validation ({sets[0].path}) is never read: give training.validation_interval (the steps between "
                f"validations), or --data.validation=[]"
            )

    def check_tokenizer(self, tokenizer: TokenizerInfo) -> None:
        """Raise UserError when the initial weights have another tokenizer than the data."""
        from megatron_tpt.indexing.tokenizer import is_of_other_tokenizer

        folder = self.training.init_from
        if folder is None or self.training.allow_other_tokenizer:
            return
        if is_of_other_tokenizer(folder, tokenizer.fingerprint):
            raise UserError(
                f"training.init_from={folder} was trained with another tokenizer than that of the data "
                f"({tokenizer.path}): make the data with {folder / 'tokenizer'}; or, where the tokens mean the same, "
                f"give --training.allow_other_tokenizer=true"
            )

    def warnings(self) -> Iterator[str]:
        """Warnings about settings without effect, the sequence length and the data, one line each."""
        yield from without_effect(self)
        length, context = self.training.sequence_length, self.model.max_position_embeddings
        if length > context:
            yield (
                f"training.sequence_length={length} is above model.max_position_embeddings={context}: checkpoints are "
                f"exported with {length}; raise model.max_position_embeddings to agree, and model.rotary_base or the "
                f"rope_ fields to extend the model's context"
            )
        if not self.missing_data():
            yield from self.data_warnings()


def read_tokenizer_info(folder: Path) -> TokenizerInfo:
    """The tokenizer in a folder. Raises UserError when there is none."""
    from megatron_tpt.indexing.tokenizer import Tokenizer

    return TokenizerInfo.of(Tokenizer(folder))


def _vocab_size_of(checkpoint: Path) -> int | None:
    size: int | None = (read_yaml(checkpoint / "recipe.yaml").get("model") or {}).get("vocab_size")
    return size


def _fill_in_preset(raw: dict[str, Any]) -> None:
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("preset") is None:
        return
    presets = spec_named(model.get("family", DEFAULT_FAMILY)).presets
    if not isinstance(model["preset"], str) or model["preset"] not in presets:
        raise UserError(f"model.preset={model['preset']} is not known: use one of {', '.join(sorted(presets))}")
    raw["model"] = {**presets[model["preset"]], **model}


def _take_shape_of_checkpoint(raw: dict[str, Any]) -> None:
    """Take the model fields that are not given from the checkpoint that the run starts from."""
    training, model = raw.get("training"), raw.get("model") or {}
    if isinstance(training, dict) and training.get("init_from") is not None and isinstance(model, dict):
        folder = checkpoint_named(expand_path(str(training["init_from"])))
        if not (folder / "recipe.yaml").is_file():
            raise UserError(f"training.init_from={folder} is no checkpoint: give one like RUN/checkpoints/latest")
        training["init_from"] = str(folder)  # `latest` may name another checkpoint later
        own = read_yaml(folder / "recipe.yaml").get("model") or {}
        there, here = (one.get("family", DEFAULT_FAMILY) for one in (own, own | model))
        if here != there:
            raise UserError(
                f"training.init_from={folder} has a model of model.family={there}, and this recipe "
                f"model.family={here}: omit the field"
            )
        raw["model"] = {**own, **model}
