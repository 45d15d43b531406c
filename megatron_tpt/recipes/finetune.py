"""Supervised fine-tuning on conversations, or on prompts and responses."""

import bisect
import dataclasses
import glob
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from megatron_tpt.config.data import SftDataConfig
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.config.rules import Rule
from megatron_tpt.config.training import SftTrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import TokenizerInfo
from megatron_tpt.indexing.pack_manifest import PackManifest, is_packed
from megatron_tpt.recipes.base import NO_DATA, DataIdentity, TrainingRecipe, read_tokenizer_info
from megatron_tpt.training.data_checks import is_all_packed, packed_warnings, rows_per_epoch
from megatron_tpt.training.outcome import can_be_exported, describe_outcome, evaluate_command

if TYPE_CHECKING:  # it imports torch
    from megatron_tpt.training.data import TrainingData

logger = logging.getLogger(__name__)

_NEEDS_FILES = Rule(
    "data",
    ("prompt_column", "response_column", "on_too_long"),
    lambda recipe: not is_all_packed(recipe.data),
    "files of examples: packed data has been read and limited in length by tools/pack_sft.py",
)


_NEEDS_PACKED = Rule(
    "data",
    ("weights", "num_examples"),
    lambda recipe: is_packed(recipe.data.train),
    "packed indices: pack data.train (tools/pack_sft.py), or choose rows in the files themselves",
)


@dataclass
class FinetuneRecipe(TrainingRecipe):
    """A supervised fine-tuning run."""

    program = "finetune"
    activity = "fine-tuning"
    rules = (*Recipe.rules, _NEEDS_FILES, _NEEDS_PACKED)

    training: SftTrainingConfig = field(default_factory=SftTrainingConfig)
    """Steps or epochs, batch, precision."""
    data: SftDataConfig = field(default_factory=SftDataConfig)
    """Conversations, or prompts and responses."""

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer to fine-tune with: data.tokenizer, or that of the packed data (PREFIX.tokenizer), or that of
        the checkpoint to start from."""
        if self.data.tokenizer is not None:
            return self.data.tokenizer
        for prefix in self.data.train:
            if (folder := Path(f"{prefix}.tokenizer")).is_dir():
                return folder
        if self.training.init_from is None:
            raise UserError(
                "neither data.tokenizer nor training.init_from (whose tokenizer would be used) is given: give one"
            )
        return self.training.init_from / "tokenizer"

    def packed_prefixes(self) -> list[Path]:
        return self.data.train if is_packed(self.data.train) else []

    def resolve(self) -> Self:
        return super().resolve().with_steps()

    def with_steps(self) -> Self:
        """The recipe with the number of steps for `training.num_epochs`, if that is given.

        The last step may extend into the next epoch. Raises UserError for data that is not packed.
        """
        training = self.training
        if training.num_epochs is None:
            return self
        if not is_packed(self.data.train):
            raise UserError(
                "training.num_epochs needs packed indices: pack data.train (tools/pack_sft.py), or give "
                "training.num_steps"
            )
        num_rows = sum(rows_per_epoch(self.data))
        num_samples = math.ceil(num_rows * training.num_epochs)
        num_steps = bisect.bisect_left(range(num_samples), num_samples, key=training.num_samples)
        if training.num_steps not in (num_steps, type(training)().num_steps):
            raise UserError(
                f"training.num_steps={training.num_steps} and training.num_epochs={training.num_epochs:g} "
                f"(which takes {num_steps} steps) were both given: give one of them"
            )
        logger.info(f"training.num_epochs={training.num_epochs:g} takes {num_steps} steps")
        return dataclasses.replace(self, training=dataclasses.replace(training, num_steps=num_steps))

    def check_data(self) -> None:
        if (cp := self.parallel.context_parallel_size) > 1:
            raise UserError(
                f"parallel.context_parallel_size={cp} cannot split packed examples: set it to 1, and "
                f"parallel.tensor_parallel_size higher with parallel.sequence_parallel where memory is short"
            )
        if not self.data.train:
            raise UserError(NO_DATA)

    def read_tokenizer(self) -> TokenizerInfo | None:
        return read_tokenizer_info(self.tokenizer_path)

    def missing_data(self) -> list[Path]:
        paths = [*self.data.train, *(one.path for one in self.data.validation)]
        here = [path for path in paths if path.exists() or PackManifest.path(path).exists()]
        return [path for path in paths if path not in here and not glob.has_magic(str(path))]

    def data_warnings(self) -> Iterator[str]:
        return packed_warnings(self.data)

    def describe_data(self) -> tuple[str, DataIdentity]:
        from megatron_tpt.training.sft import describe_examples

        return describe_examples(self)

    def build_data(self) -> "TrainingData":
        from megatron_tpt.training.sft import build_sft_data

        return build_sft_data(self)

    def next_steps(self, num_tokens: int) -> str:
        evaluate = [evaluate_command(self)] if can_be_exported(self) else []
        return "\n".join([describe_outcome(self, num_tokens), *evaluate])
