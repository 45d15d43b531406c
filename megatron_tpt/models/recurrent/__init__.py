"""The family `recurrent`: a GPT whose middle layers are passed several times (arXiv 2511.07384).

Its configuration and depths (config.py, depth.py) are free of torch; build.py builds, block.py runs the layers,
state.py draws the initial state. All else is as in the family `gpt`, from which it may import.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.models.recurrent.config import RecurrentConfig
from megatron_tpt.models.recurrent.presets import PRESETS
from megatron_tpt.models.spec import ModelSpec

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel


class RecurrentSpec(ModelSpec[RecurrentConfig]):
    """Build of the family."""

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


SPEC = RecurrentSpec()
