"""The configuration of a GPT and its tensors. Where names differ, fields have those of Hugging Face."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megatron_tpt.config.fields import Decay, NonNegativeFloat, PositiveFloat, PositiveInt
from megatron_tpt.config.model import Activation, ModelConfig, Weight
from megatron_tpt.config.on_change import Effect, on_change
from megatron_tpt.errors import UserError

_FIELDS_OF_ROPE: dict[str, tuple[str, ...]] = {
    "llama3": ("rope_original_context", "rope_low_freq_factor", "rope_high_freq_factor"),
    "linear": (),
    "yarn": (
        "rope_original_context",
        "rope_beta_fast",
        "rope_beta_slow",
        "rope_truncate",
        "rope_attention_factor",
    ),
}


@on_change(
    {
        (Effect.REFUSED, Effect.REFUSED): "qkv_bias attention_output_bias mlp_bias qk_norm",
        (Effect.WARNED, Effect.WARNED): """
            rotary_base rope_scaling_factor rope_scaling_type rope_original_context rope_low_freq_factor
            rope_high_freq_factor rope_beta_fast rope_beta_slow rope_truncate rope_attention_factor
            norm_epsilon
        """,
        (Effect.WARNED, Effect.FREE): "hidden_dropout attention_dropout",
    }
)
@dataclass
class GPTConfig(ModelConfig):
    """A decoder-only transformer of the Llama and Qwen families: RMSNorm, rotary positions, SwiGLU, grouped queries."""

    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies (theta)."""
    rope_scaling_factor: PositiveFloat | None = None
    """Factor by which scaling of the rotary frequencies extends the context (8 for Llama 3.1, 32 for Llama 3.2); no
    scaling when not given."""
    rope_scaling_type: Literal["llama3", "linear", "yarn"] = "llama3"
    """How the frequencies are scaled: low ones are divided by the factor (llama3), all are (linear), or low ones are
    and attention gets a temperature (yarn)."""
    rope_original_context: PositiveInt = 8192
    """Context before the extension, in tokens, by which llama3 and yarn determine which frequencies are low
    (original_max_position_embeddings)."""
    rope_low_freq_factor: PositiveFloat = 1.0
    """llama3: frequencies with fewer turns than this in the original context are divided by the factor."""
    rope_high_freq_factor: PositiveFloat = 4.0
    """llama3: frequencies with more turns than this in the original context are not changed."""
    rope_beta_fast: PositiveFloat = 32.0
    """yarn: frequencies with more turns than this in the original context are not changed."""
    rope_beta_slow: PositiveFloat = 1.0
    """yarn: frequencies with fewer turns than this in the original context are divided by the factor."""
    rope_truncate: bool = True
    """yarn: round the dimensions of these limits to integers."""
    rope_attention_factor: PositiveFloat | None = None
    """yarn: factor on the cosines and sines; 0.1 ln(rope_scaling_factor) + 1 when not given."""
    norm_epsilon: NonNegativeFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    attention_output_bias: bool = False
    """Bias on the output projection of attention (with qkv_bias: Hugging Face's attention_bias)."""
    mlp_bias: bool = False
    """Bias on the three projections of the feed-forward network (Hugging Face's mlp_bias)."""
    qk_norm: bool = False
    """RMSNorm on every query and key head (Qwen3)."""
    hidden_dropout: Decay = 0.0
    """Dropout on the residual branches."""
    attention_dropout: Decay = 0.0
    """Dropout on the attention weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise UserError(
                f"model.rope_high_freq_factor={self.rope_high_freq_factor} must be above model.rope_low_freq_factor="
                f"{self.rope_low_freq_factor}"
            )
        is_scaled = self.rope_scaling_factor is not None
        used = {*_FIELDS_OF_ROPE[self.rope_scaling_type], "rope_scaling_type"} if is_scaled else set()
        changed = {
            field.name
            for field in dataclasses.fields(self)
            if field.name.startswith("rope_") and getattr(self, field.name) != field.default
        }
        if unused := sorted(changed - used - {"rope_scaling_factor"}):
            kind = f"rope_scaling_type={self.rope_scaling_type}" if used else "rope_scaling_factor, which is not given"
            raise UserError(f"model.{unused[0]} has no effect with {kind}: omit it, or change the other")

    def weights(self) -> list[Weight]:
        h, f, d = self.hidden_size, self.ffn_hidden_size, self.kv_channels
        q = self.num_attention_heads * d
        qkv = q + 2 * self.query_groups * d
        table = (self.padded_vocab_size, h)
        attention, mlp = "decoder.layers.self_attention.", "decoder.layers.mlp."

        def of_layer(key: str, *shape: int, is_split: bool = False) -> Weight:
            return Weight(key, shape, "layer", is_split)

        norms = [of_layer(f"{attention}q_layernorm.weight", d), of_layer(f"{attention}k_layernorm.weight", d)]
        return [
            Weight("embedding.word_embeddings.weight", table, "embedding", is_split=True),
            of_layer(f"{attention}linear_qkv.layer_norm_weight", h),
            of_layer(f"{attention}linear_qkv.weight", qkv, h, is_split=True),
            *([of_layer(f"{attention}linear_qkv.bias", qkv, is_split=True)] if self.qkv_bias else []),
            *(norms if self.qk_norm else []),
            of_layer(f"{attention}linear_proj.weight", h, q, is_split=True),
            *([of_layer(f"{attention}linear_proj.bias", h)] if self.attention_output_bias else []),
            of_layer(f"{mlp}linear_fc1.layer_norm_weight", h),
            of_layer(f"{mlp}linear_fc1.weight", 2 * f, h, is_split=True),
            *([of_layer(f"{mlp}linear_fc1.bias", 2 * f, is_split=True)] if self.mlp_bias else []),
            of_layer(f"{mlp}linear_fc2.weight", h, f, is_split=True),
            *([of_layer(f"{mlp}linear_fc2.bias", h)] if self.mlp_bias else []),
            Weight("decoder.final_layernorm.weight", (h,), "output"),
            Weight("output_layer.weight", table, "output", is_split=True, is_tied=self.tie_embeddings),
        ]

    def activations(self, sequence_length: int) -> dict[str, Activation]:
        """The inputs of the layer's two halves and the norms' outputs ("residual"); queries, keys, values and the
        attention's output ("attention"); and the two halves of the feed-forward network and their product ("mlp").
        Megatron Core's own attention also keeps its scores before and after the softmax ("core_attn"); Transformer
        Engine's none (Korthikanti et al., arXiv 2205.05198, section 4, for this block with fused attention)."""
        heads = 2 * (self.num_attention_heads + self.query_groups) * self.kv_channels
        scores = 2 * self.num_attention_heads * sequence_length if self.transformer_impl == "local" else 0
        return {
            "residual": Activation(4 * self.hidden_size, is_split=False),
            "attention": Activation(heads, is_split=True),
            "core_attn": Activation(scores, is_split=True),
            "mlp": Activation(3 * self.ffn_hidden_size, is_split=True),
        }
