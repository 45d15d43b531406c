"""The family `recurrent`: a GPT whose middle layers are passed several times (arXiv 2511.07384).

Its configuration and depths (config.py, depth.py) are free of torch; build.py builds, block.py runs the layers,
state.py draws the initial state. All else is as in the family `gpt`, from which it may import.

Exports are of a model_type of our own: hugging_face.py is the adapter; configuration_recurrent_gpt.py,
modeling_recurrent_gpt.py and state.py travel with them, and registration.py makes them known here.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.models.recurrent.config import RecurrentConfig
from megatron_tpt.models.recurrent.presets import PRESETS
from megatron_tpt.models.spec import ModelSpec

if TYPE_CHECKING:
    from megatron_tpt.models.hugging_face import HuggingFaceAdapter

    from megatron.core.models.gpt.gpt_model import GPTModel


class RecurrentSpec(ModelSpec[RecurrentConfig]):
    """Build and adapter of the family."""

    config = RecurrentConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    def build(
        self,
        model: RecurrentConfig,
        parallel: ParallelConfig,
        training: TrainingConfig,
        *,
        seed: int | None,
        vp_stage: int | None = None,
    ) -> "GPTModel":
        from megatron_tpt.models.recurrent.build import build_model

        return build_model(model, parallel, training, seed=seed)

    def hugging_face(self) -> "HuggingFaceAdapter[RecurrentConfig]":
        from megatron_tpt.models.recurrent.hugging_face import RecurrentAdapter

        return RecurrentAdapter()

    def register_classes(self, *, models: bool) -> None:
        from megatron_tpt.models.recurrent import registration

        registration.register_config()
        if models:
            registration.register_model()


SPEC = RecurrentSpec()
