"""The family `scaled`: a GPT whose embeddings are multiplied by a constant, as Gemma's are. No adapter."""

from dataclasses import dataclass

from megatron_tpt.config.on_change import Effect, on_change
from megatron_tpt.errors import require
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.models.spec import ModelSpec


@on_change({(Effect.WARNED, Effect.WARNED): "embedding_scale"})
@dataclass
class ScaledConfig(GPTConfig):
    """A GPT with scaled embeddings."""

    family: str = "scaled"
    """This family."""
    embedding_scale: float = 8.0
    """Factor on the embeddings."""

    def __post_init__(self):
        super().__post_init__()
        require(self.embedding_scale > 0, f"model.embedding_scale={self.embedding_scale} must be above 0")


class ScaledSpec(ModelSpec[ScaledConfig]):
    config = ScaledConfig

    def build(self, model, parallel, training, *, seed, vp_stage=None):
        from megatron_tpt.models.gpt.build import build_model

        gpt = build_model(model, parallel, training, seed=seed, vp_stage=vp_stage)
        if gpt.pre_process:
            gpt.embedding.register_forward_hook(lambda module, inputs, output: output * model.embedding_scale)
        return gpt


SPEC = ScaledSpec()
