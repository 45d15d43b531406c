"""The Hugging Face adapter of GPTs: Llama, Qwen2, Qwen3 and OLMo-2 (dense) models."""

from pathlib import Path
from typing import Any

from megatron_tpt.config.model import Weight
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.models.gpt.hf_config import MODEL_TYPES, from_hf_config, to_hf_config
from megatron_tpt.models.gpt.hf_fields import describe_kept
from megatron_tpt.models.gpt.hf_rope import describe_rope
from megatron_tpt.models.hugging_face import (
    GateUp,
    HuggingFaceAdapter,
    QueryKeyValue,
    Row,
    Same,
    Transform,
    Vocabulary,
)

_LAYER = "model.{layer}."
# Modules with weights or biases: Megatron Core's name, and the names of the corresponding modules in transformers.
_MODULES = {
    "embedding.word_embeddings": ("model.embed_tokens",),
    "decoder.layers.self_attention.linear_qkv": tuple(f"{_LAYER}self_attn.{name}_proj" for name in "qkv"),
    "decoder.layers.self_attention.q_layernorm": (f"{_LAYER}self_attn.q_norm",),
    "decoder.layers.self_attention.k_layernorm": (f"{_LAYER}self_attn.k_norm",),
    "decoder.layers.self_attention.linear_proj": (f"{_LAYER}self_attn.o_proj",),
    "decoder.layers.mlp.linear_fc1": (f"{_LAYER}mlp.gate_proj", f"{_LAYER}mlp.up_proj"),
    "decoder.layers.mlp.linear_fc2": (f"{_LAYER}mlp.down_proj",),
    "decoder.final_layernorm": ("model.norm",),
    "output_layer": ("lm_head",),
}
_NORMS = {
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": f"{_LAYER}input_layernorm.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": f"{_LAYER}post_attention_layernorm.weight",
    "decoder.layers.self_attn_bda.norm.weight": f"{_LAYER}post_attention_layernorm.weight",
    "decoder.layers.mlp_bda.norm.weight": f"{_LAYER}post_feedforward_layernorm.weight",
}


def row_of(model: GPTConfig, weight: Weight) -> Row:
    """The row of a weight of a GPT."""
    if weight.key in _NORMS:
        return Row(weight, (_NORMS[weight.key],), Same())
    module, _, kind = weight.key.rpartition(".")
    transform: Transform = Same()
    if module.endswith("linear_qkv"):
        transform = QueryKeyValue(
            model.query_groups, model.num_attention_heads // model.query_groups, model.kv_channels
        )
    elif module.endswith("linear_fc1"):
        transform = GateUp()
    elif module in ("embedding.word_embeddings", "output_layer"):
        padded = model.padded_vocab_size
        transform = Vocabulary(model.vocab_size or padded, padded)
    return Row(weight, tuple(f"{name}.{kind}" for name in _MODULES[module]), transform)


class GPTAdapter(HuggingFaceAdapter[GPTConfig]):
    """The adapter of the family."""

    architectures = tuple(MODEL_TYPES)

    def from_config(self, config: dict[str, Any], source: Path) -> GPTConfig:
        return from_hf_config(config, source)

    def to_config(
        self, model: GPTConfig, *, dtype: str, token_ids: dict[str, Any], original: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return to_hf_config(model, dtype=dtype, token_ids=token_ids, original=original)

    def notes(self, config: dict[str, Any]) -> list[str]:
        return [*describe_kept(config), *describe_rope(config)]

    def rows(self, model: GPTConfig) -> list[Row]:
        return [row_of(model, weight) for weight in model.weights() if not weight.is_tied]
