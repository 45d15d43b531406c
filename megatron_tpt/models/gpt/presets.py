"""Published model shapes by name, for `model.preset`, from the config.json of each on the Hugging Face Hub."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32,
        "num_query_groups": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rotary_base": 500000.0,
    },
    "llama3.2-3b": {
        "num_layers": 28, "hidden_size": 3072, "ffn_hidden_size": 8192, "num_attention_heads": 24,
        "num_query_groups": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rotary_base": 500000.0, "rope_scaling_factor": 32.0, "tie_embeddings": True,
    },
    "llama3.2-1b": {
        "num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32,
        "num_query_groups": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rotary_base": 500000.0, "rope_scaling_factor": 32.0, "tie_embeddings": True,
    },
    "qwen2.5-math-1.5b": {
        "num_layers": 28, "hidden_size": 1536, "ffn_hidden_size": 8960, "num_attention_heads": 12,
        "num_query_groups": 2, "vocab_size": 151936, "max_position_embeddings": 4096, "rotary_base": 10000.0,
        "norm_epsilon": 1e-6, "tie_embeddings": True, "qkv_bias": True,
    },
    "qwen2.5-math-7b": {
        "num_layers": 28, "hidden_size": 3584, "ffn_hidden_size": 18944, "num_attention_heads": 28,
        "num_query_groups": 4, "vocab_size": 152064, "max_position_embeddings": 4096, "rotary_base": 10000.0,
        "norm_epsilon": 1e-6, "qkv_bias": True,
    },
}  # fmt: skip
