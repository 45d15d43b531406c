"""A layer of OLMo-2 for vLLM, put together from the same parts of its Olmo Hybrid: it has no OLMo-2 of its own."""

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.olmo_hybrid import OlmoHybridAttention, OlmoHybridMLP


class Olmo2DecoderLayer(nn.Module):
    """Norms after attention and MLP, and over the queries and the keys of all heads together."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = OlmoHybridAttention(vllm_config=vllm_config, prefix=f"{prefix}.self_attn")
        self.mlp = OlmoHybridMLP(vllm_config=vllm_config, prefix=f"{prefix}.mlp")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: None) -> tuple[Tensor, None]:
        """[n, h] -> [n, h], with nothing left to add."""
        hidden_states = hidden_states + self.post_attention_layernorm(self.self_attn(positions, hidden_states))
        return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states)), None
