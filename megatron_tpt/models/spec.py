"""The interface of a model family: `spec_of(recipe.model).build(...)`. torch is only imported to build a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_tpt.config.model import ModelConfig, families, spec_named
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig

if TYPE_CHECKING:
    from megatron_tpt.models.hugging_face import HuggingFaceAdapter

    from megatron.core.models.gpt.gpt_model import GPTModel


class ModelSpec[C: ModelConfig](ABC):
    """A model family, `SPEC` in the __init__.py of its folder. Build and adapter are only imported on demand."""

    config: type[C]
    """Its configuration, whose field `family` defaults to the name of the folder."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Fields by name, for `model.preset`."""

    @abstractmethod
    def build(
        self,
        model: C,
        parallel: ParallelConfig,
        training: TrainingConfig,
        *,
        seed: int | None,
        vp_stage: int | None = None,
    ) -> "GPTModel":
        """This rank's part of the model (of its virtual pipeline stage), on its device and in the precision of
        training. Weights are drawn from `seed`, equally for every layout; without a seed they are uninitialized.

        Needs process groups. Raises UserError for settings that cannot run on this machine.
        """

    def hugging_face(self) -> "HuggingFaceAdapter[C] | None":
        """The adapter to Hugging Face's format; None for a family without a counterpart there."""
        return None

    def register_classes(self, *, models: bool) -> None:
        """Make transformers' Auto classes know the configuration of this family's exports, and their `models` too, if
        these are not transformers' own."""
        return


def spec_of[C: ModelConfig](model: C) -> ModelSpec[C]:
    """The family of a model."""
    spec: ModelSpec[C] = spec_named(model.family)
    return spec


def all_specs() -> list[ModelSpec[Any]]:
    """Every family."""
    return [spec_named(name) for name in families()]


def register_classes(*, models: bool) -> None:
    """ModelSpec.register_classes of every family, so that no code in a model's folder is run."""
    for spec in all_specs():
        spec.register_classes(models=models)


def build_chunks[C: ModelConfig](
    model: C, parallel: ParallelConfig, training: TrainingConfig, *, seed: int | None
) -> "list[GPTModel]":
    """This rank's part of the model: one chunk, or parallel.virtual_pipeline_parallel_size of them."""
    vp = parallel.virtual_pipeline_parallel_size
    stages = range(vp) if vp > 1 else [None]
    return [spec_of(model).build(model, parallel, training, seed=seed, vp_stage=stage) for stage in stages]
