"""What a model family is to everything else: `spec_of(recipe.model).build(...)`. No torch until it builds."""

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
    """A family. Its folder's __init__.py has one as `SPEC`; build and adapter are imported when they are asked for."""

    config: type[C]
    """Its configuration, whose `family` has the folder's name as its default."""
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
        training; its weights drawn from `seed` alike for every layout, or whatever was in memory without one.

        Needs process groups. Raises UserError for what cannot run on this machine.
        """

    def hugging_face(self) -> "HuggingFaceAdapter[C] | None":
        """How its models become Hugging Face folders and back; None for a family that has no counterpart there."""
        return None


def spec_of[C: ModelConfig](model: C) -> ModelSpec[C]:
    """The family of a model."""
    spec: ModelSpec[C] = spec_named(model.family)
    return spec


def all_specs() -> list[ModelSpec[Any]]:
    """Every family."""
    return [spec_named(name) for name in families()]


def build_chunks[C: ModelConfig](
    model: C, parallel: ParallelConfig, training: TrainingConfig, *, seed: int | None
) -> "list[GPTModel]":
    """This rank's part of the model: one piece, or parallel.virtual_pipeline_parallel_size of them."""
    vp = parallel.virtual_pipeline_parallel_size
    stages = range(vp) if vp > 1 else [None]
    return [spec_of(model).build(model, parallel, training, seed=seed, vp_stage=stage) for stage in stages]
