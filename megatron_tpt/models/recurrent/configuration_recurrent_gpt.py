"""config.json of a recurrent model, for transformers 5. This file travels with exported models: it imports nothing else
of this package."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

PARENTS = ("llama", "qwen2", "qwen3", "olmo2")
"""`model_type` of the models whose layers there are."""


class RecurrentGPTConfig(PreTrainedConfig):
    """A transformer whose middle layers, the block, are passed several times. The other fields are those of its parent,
    which has the same layers."""

    model_type = "recurrent_gpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    parent_model_type: str = "llama"
    """Which model has such layers."""
    num_prelude_layers: int = 1
    """First layers, which every iteration reads."""
    num_block_layers: int = 1
    """Layers that are passed several times."""
    num_coda_layers: int = 1
    """Last layers."""
    num_recurrences: int = 4
    """Iterations over the block where no other number is asked for."""
    mean_recurrences: int | None = None
    """Mean number of iterations in training."""
    initial_state_std: float = 0.008703882797784892
    """Standard deviation of the initial state before it is truncated at three times that."""
    initial_state_seed: int = 0
    """Of the initial state, which depends on it and on a token's position alone."""

    vocab_size: int = 32000
    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 3
    """Prelude, block and coda: every layer counted once."""
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.parent_model_type not in PARENTS:
            raise ValueError(f"parent_model_type={self.parent_model_type!r}: known are {', '.join(PARENTS)}")
        parts = (self.num_prelude_layers, self.num_block_layers, self.num_coda_layers)
        if sum(parts) != self.num_hidden_layers or min(parts) < 0 or self.num_block_layers < 1:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} is not the sum of num_prelude_layers, num_block_layers (1 "
                f"or more) and num_coda_layers, {parts}"
            )
        if self.num_recurrences < 1:
            raise ValueError(f"num_recurrences={self.num_recurrences} must be 1 or more")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
