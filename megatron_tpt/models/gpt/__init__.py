"""The family `gpt`: Llama, Qwen2 and Qwen3 models as Megatron Core's `GPTModel`.

Its configuration (config.py, presets.py) and `SPEC` are free of torch; build.py builds, hugging_face.py and hf_*.py are
the adapter. May import what models/ may, and of models/ what is common to all families; no other family.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.models.gpt.presets import PRESETS
from megatron_tpt.models.spec import ModelSpec

if TYPE_CHECKING:
    from megatron_tpt.models.hugging_face import HuggingFaceAdapter

    from megatron.core.models.gpt.gpt_model import GPTModel


class GPTSpec(ModelSpec[GPTConfig]):
    """Build and adapter of the family."""

    config = GPTConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    def build(
        self,
        model: GPTConfig,
        parallel: ParallelConfig,
        training: TrainingConfig,
        *,
        seed: int | None,
        vp_stage: int | None = None,
    ) -> "GPTModel":
        from megatron_tpt.models.gpt.build import build_model

        return build_model(model, parallel, training, seed=seed, vp_stage=vp_stage)

    def hugging_face(self) -> "HuggingFaceAdapter[GPTConfig]":
        from megatron_tpt.models.gpt.hugging_face import GPTAdapter

        return GPTAdapter()


SPEC = GPTSpec()
