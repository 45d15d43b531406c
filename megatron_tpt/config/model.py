"""The shape of a model, in Hugging Face's terms where Megatron Core and Hugging Face differ in name."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megatron_tpt.config.fields import Decay, NonNegativeFloat, PositiveFloat, PositiveInt, check_bounds
from megatron_tpt.config.on_change import Effect, on_change
from megatron_tpt.errors import UserError


@on_change(
    {
        (Effect.REFUSED, Effect.REFUSED): """
            num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups head_dim
            tie_embeddings qkv_bias attention_output_bias mlp_bias qk_norm
        """,
        # Rows of the embedding are added for tokens that the checkpoint lacks (training.new_token_rows).
        (Effect.REFUSED, Effect.FREE): "vocab_size vocab_padding_multiple",
        (Effect.WARNED, Effect.WARNED): """
            rotary_base rope_scaling_factor rope_scaling_type rope_original_context rope_low_freq_factor
            rope_high_freq_factor rope_beta_fast rope_beta_slow rope_truncate rope_attention_factor
            norm_epsilon
        """,
        (Effect.WARNED, Effect.FREE): "hidden_dropout attention_dropout",
        (Effect.NONE, Effect.NONE): "init_std",
        (Effect.FREE, Effect.FREE): "preset max_position_embeddings transformer_impl",
    }
)
@dataclass
class ModelConfig:
    """A decoder-only transformer of the Llama and Qwen families: RMSNorm, rotary positions, SwiGLU, grouped queries."""

    preset: str | None = None
    """Name of a size preset (see megatron_tpt/models/presets.py) that fills in every field not given."""
    num_layers: PositiveInt = 2
    """Transformer blocks."""
    hidden_size: PositiveInt = 64
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt = 192
    """Width inside the feed-forward network (each of its two gated halves)."""
    num_attention_heads: PositiveInt = 4
    """Query heads."""
    num_query_groups: PositiveInt | None = None
    """Key/value heads (grouped-query attention); as many as query heads when not given."""
    head_dim: PositiveInt | None = None
    """Width of one head; hidden_size / num_attention_heads when not given."""
    vocab_size: PositiveInt | None = None
    """Tokens in the vocabulary; the training data's tokenizer decides when not given."""
    vocab_padding_multiple: PositiveInt = 128
    """The embedding's rows are padded to a multiple of this, so that tensor parallelism divides them. It does not
    depend on the layout: a checkpoint fits any."""
    max_position_embeddings: PositiveInt = 8192
    """Longest sequence the model is said to handle (written to exports; rotary positions need no table)."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies (theta)."""
    rope_scaling_factor: PositiveFloat | None = None
    """How many times the context is stretched by changing the rotary frequencies (8 for Llama 3.1, 32 for Llama 3.2);
    no change when not given."""
    rope_scaling_type: Literal["llama3", "linear", "yarn"] = "llama3"
    """How the frequencies change: low ones are divided by the factor (llama3), all are (linear), or low ones are and
    attention gets a temperature (yarn)."""
    rope_original_context: PositiveInt = 8192
    """Context before stretching, in tokens, from which llama3 and yarn decide what a low frequency is
    (original_max_position_embeddings)."""
    rope_low_freq_factor: PositiveFloat = 1.0
    """llama3: frequencies with fewer turns than this in the original context are divided by the factor."""
    rope_high_freq_factor: PositiveFloat = 4.0
    """llama3: frequencies with more turns than this in the original context stay as they are."""
    rope_beta_fast: PositiveFloat = 32.0
    """yarn: frequencies with more turns than this in the original context stay as they are."""
    rope_beta_slow: PositiveFloat = 1.0
    """yarn: frequencies with fewer turns than this in the original context are divided by the factor."""
    rope_truncate: bool = True
    """yarn: round the dimensions where these limits lie to whole ones."""
    rope_attention_factor: PositiveFloat | None = None
    """yarn: factor on the cosines and sines; 0.1 ln(rope_scaling_factor) + 1 when not given."""
    norm_epsilon: NonNegativeFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding matrix as output matrix too."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    attention_output_bias: bool = False
    """Bias on the projection behind attention (with qkv_bias: Hugging Face's attention_bias)."""
    mlp_bias: bool = False
    """Bias on the three projections of the feed-forward network (Hugging Face's mlp_bias)."""
    qk_norm: bool = False
    """RMSNorm on every query and key head (Qwen3)."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of the initial weights; the two projections back into the residual stream get
    init_std / sqrt(2 * num_layers)."""
    hidden_dropout: Decay = 0.0
    """Dropout on the residual branches."""
    attention_dropout: Decay = 0.0
    """Dropout on the attention weights."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Kernels: Transformer Engine's, Megatron Core's own in plain torch (local), or auto: local on a CPU,
    Transformer Engine on a GPU (an error when it is not installed)."""

    def __post_init__(self) -> None:
        check_bounds(self, "model.")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.hidden_size={self.hidden_size} is not a multiple of model.num_attention_heads="
                f"{self.num_attention_heads}: change one of them or give model.head_dim"
            )
        if self.num_attention_heads % self.query_groups:
            raise UserError(
                f"model.num_attention_heads={self.num_attention_heads} is not a multiple of model.num_query_groups="
                f"{self.query_groups}: change one of them"
            )
        self._check_rope()

    def _check_rope(self) -> None:
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise UserError(
                f"model.rope_high_freq_factor={self.rope_high_freq_factor} must be above model.rope_low_freq_factor="
                f"{self.rope_low_freq_factor}"
            )
        of_type = {
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
        used = set() if self.rope_scaling_factor is None else {*of_type[self.rope_scaling_type], "rope_scaling_type"}
        changed = {
            field.name
            for field in dataclasses.fields(self)
            if field.name.startswith("rope_") and getattr(self, field.name) != field.default
        }
        if unused := sorted(changed - used - {"rope_scaling_factor"}):
            kind = f"rope_scaling_type={self.rope_scaling_type}" if used else "rope_scaling_factor, which is not given"
            raise UserError(f"model.{unused[0]} has no effect with {kind}: omit it, or change the other")

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def kv_channels(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to the padding multiple."""
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not known: give it, or training data whose tokenizer decides it")
        return -(-self.vocab_size // self.vocab_padding_multiple) * self.vocab_padding_multiple

    def num_parameters(self) -> int:
        """All parameters, with the padded embedding rows."""
        h, f, d = self.hidden_size, self.ffn_hidden_size, self.kv_channels
        qkv_width = (self.num_attention_heads + 2 * self.query_groups) * d
        block = h * qkv_width + self.num_attention_heads * d * h + 3 * h * f + 2 * h
        block += qkv_width * self.qkv_bias + h * self.attention_output_bias + 2 * d * self.qk_norm
        block += (2 * f + h) * self.mlp_bias
        return self.num_layers * block + (1 if self.tie_embeddings else 2) * self.padded_vocab_size * h + h
