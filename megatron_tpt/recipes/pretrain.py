"""Pre-training and mid-training on indexed datasets."""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron_tpt.config.data import DataConfig
from megatron_tpt.config.load import read_yaml, recipe_from_dict
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.config.rules import Rule
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import Manifest, TokenizerInfo
from megatron_tpt.indexing.pack_manifest import PackManifest
from megatron_tpt.indexing.source_manifests import read_manifests
from megatron_tpt.names import first_few
from megatron_tpt.recipes.base import NO_DATA, DataIdentity, TrainingRecipe, read_tokenizer_info
from megatron_tpt.recipes.sources import spell_out_sources
from megatron_tpt.training.blend import blends, continue_phases, describe_data
from megatron_tpt.training.data_checks import blend_warnings
from megatron_tpt.training.history import newest_recipe, step_of
from megatron_tpt.training.outcome import describe_outcome, fine_tune_command

if TYPE_CHECKING:  # it imports torch
    from megatron_tpt.training.data import TrainingData

logger = logging.getLogger(__name__)

_NEEDS_DATA = Rule(
    "data",
    ("reset_at_documents", "loss_on", "tokenizer", "cache_dir"),
    lambda recipe: not recipe.data.mock,
    "data of its own, without data.mock",
)


@dataclass
class PretrainRecipe(TrainingRecipe):
    """A pre-training or mid-training run."""

    program = "pretrain"
    activity = "pre-training"
    rules = (*Recipe.rules, _NEEDS_DATA)

    data: DataConfig = field(default_factory=DataConfig)
    """Indexed datasets."""

    @classmethod
    def expand(cls, raw: dict[str, Any]) -> None:
        if isinstance(raw.get("data"), dict):
            spell_out_sources(raw["data"])

    def resolve(self) -> Self:
        return super().resolve()._with_data_of_run()

    def _with_data_of_run(self) -> Self:
        """The recipe that continues the newest checkpoint of its run folder with other data, if it allows changes.

        The data consumed so far becomes phases, so that the order of all samples follows from the recipe alone.
        """
        path = newest_recipe(self.run.output_dir)
        if not self.data.allow_change or self.data.mock or path is None:
            return self
        step = step_of(path)
        old = recipe_from_dict(type(self), read_yaml(path)).data.all_phases
        length = self.training.sequence_length
        phases, changed = continue_phases(old, self.data.all_phases, self.training.num_samples(step), length)
        if changed:
            logger.warning(
                f"the training data changes after step {step} (data.allow_change): from there "
                + first_few([f"{source.path} x {source.weight:g}" for source in phases[-1].train], 8)
            )
        return dataclasses.replace(self, data=dataclasses.replace(self.data, train=[], phases=phases))

    def check_data(self) -> None:
        data, training = self.data, self.training
        if not (data.train or data.phases or data.mock):
            raise UserError(NO_DATA)
        if data.mock and self.model.vocab_size is None:
            raise UserError("data.mock has no tokenizer that determines the vocabulary: give model.vocab_size")
        if data.mock and (training.validation_interval or data.validation):
            raise UserError(
                "data.mock has nothing to validate with: remove training.validation_interval and data.validation"
            )
        if data.reset_at_documents and self.parallel.context_parallel_size > 1:
            raise UserError(
                "data.reset_at_documents and parallel.context_parallel_size exclude each other: turn one off"
            )
        end = data.phases[-1].end_sample(training.sequence_length) if data.phases else None
        num_samples = training.num_samples(training.num_steps)
        if end is not None and end < num_samples:
            raise UserError(
                f"data.phases end after {data.phases[-1].until_tokens:,} tokens, and training.num_steps continues to "
                f"{num_samples * training.sequence_length:,}: omit the last until_tokens"
            )

    def beyond_the_end(self) -> Iterator[str]:
        yield from super().beyond_the_end()
        training = self.training
        num_samples = training.num_samples(training.num_steps)
        for place, phase in enumerate(self.data.phases[:-1], start=1):
            if (phase.end_sample(training.sequence_length) or 0) >= num_samples:
                yield (
                    f"data.phases: the phases from number {place + 1} on are never reached: the run ends after "
                    f"training.num_steps={training.num_steps}"
                )
                break

    def read_tokenizer(self) -> TokenizerInfo | None:
        if self.data.mock:
            return None
        sources = [source for phase in self.data.all_phases for source in phase.train] + self.data.validation
        return read_manifests([source.path for source in sources])[0].tokenizer

    def check_tokenizer(self, tokenizer: TokenizerInfo) -> None:
        """Raise UserError unless the tokenizer for the checkpoints exists and equals that of the data and of the
        weights to start from."""
        folder = self.data.tokenizer or Path(tokenizer.path)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"{folder}: the tokenizer of the data is not there, and checkpoints need it: give its folder "
                f"(--data.tokenizer=FOLDER)"
            )
        found = read_tokenizer_info(folder)
        for what, ours, theirs in (
            ("tokenizer.json", found.fingerprint, tokenizer.fingerprint),
            ("end-of-sequence token", found.eos_id, tokenizer.eos_id),
        ):
            if ours != theirs:
                raise UserError(
                    f"{folder}: this is not the tokenizer of the data: its {what} differs. Give the folder of the "
                    f"one that the data was indexed with (--data.tokenizer=FOLDER), or index again"
                )
        super().check_tokenizer(tokenizer)

    def missing_data(self) -> list[Path]:
        sources = [] if self.data.mock else [source for blend in blends(self) for source in blend.sources]
        return [
            Manifest.path(source.path)
            for source in sources
            if not (Manifest.path(source.path).exists() or PackManifest.path(source.path).exists())
        ]

    def data_warnings(self) -> Iterator[str]:
        if not self.data.mock:
            yield from blend_warnings(self)

    def describe_data(self) -> tuple[str, DataIdentity]:
        def identity(num_samples: int) -> dict[str, str]:
            from megatron_tpt.training.pretrain_data import pretrain_identity  # Megatron Core, which takes seconds

            return pretrain_identity(self)(num_samples)

        return describe_data(self), identity

    def prepare_data(self) -> None:
        from megatron_tpt.training.pretrain_data import prepare_cache

        prepare_cache(self)

    def build_data(self) -> "TrainingData":
        from megatron_tpt.training.pretrain_data import build_pretrain_data

        return build_pretrain_data(self)

    def next_steps(self, num_tokens: int) -> str:
        return "\n".join([describe_outcome(self, num_tokens), fine_tune_command(self)])
