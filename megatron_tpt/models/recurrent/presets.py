"""Published models cut as in arXiv 2511.07384, by name, for `model.preset`: shapes from config.json of each on the
Hugging Face Hub, untied, with the splits of the paper (that of Llama-3.2-1B is inferred from its other splits)."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b-4-8-4": {
        "num_layers": 16, "prelude_layers": 4, "coda_layers": 4, "hidden_size": 2048, "ffn_hidden_size": 5632,
        "num_attention_heads": 32, "num_query_groups": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "llama3.2-1b-4-6-4": {
        "num_layers": 14, "prelude_layers": 4, "coda_layers": 4, "hidden_size": 2048, "ffn_hidden_size": 8192,
        "num_attention_heads": 32, "num_query_groups": 8, "head_dim": 64, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rotary_base": 500000.0, "rope_scaling_factor": 32.0,
    },
    "olmo2-1b-4-6-4": {
        "num_layers": 14, "prelude_layers": 4, "coda_layers": 4, "hidden_size": 2048, "ffn_hidden_size": 8192,
        "num_attention_heads": 16, "num_query_groups": 16, "vocab_size": 100352, "max_position_embeddings": 4096,
        "rotary_base": 500000.0, "norm_epsilon": 1e-6, "norm_placement": "after", "qk_norm": True,
        "qk_norm_width": "all-heads",
    },
}  # fmt: skip
