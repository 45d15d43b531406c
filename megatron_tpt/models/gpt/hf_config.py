"""Conversion between GPTConfig and config.json of Hugging Face's Llama, Qwen2 and Qwen3 (dense) models."""

import reprlib
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.models.gpt.hf_fields import kept_fields, refuse_unsupported
from megatron_tpt.models.gpt.hf_rope import read_rope, write_rope

MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_SHAPE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def architecture_of(model: GPTConfig) -> str:
    """The Hugging Face class that computes the same as the model. Raises UserError when there is none."""
    biases = (model.qkv_bias, model.attention_output_bias, model.mlp_bias)
    # Keys: qk_norm, and biases on the QKV projections, the attention output and the feed-forward network.
    computes = {
        (False, False, False, False): "LlamaForCausalLM",
        (False, False, False, True): "LlamaForCausalLM",
        (False, True, True, False): "LlamaForCausalLM",
        (False, True, True, True): "LlamaForCausalLM",
        (False, True, False, False): "Qwen2ForCausalLM",
        (True, False, False, False): "Qwen3ForCausalLM",
        (True, True, True, False): "Qwen3ForCausalLM",
    }
    architecture = computes.get((model.qk_norm, *biases))
    if architecture is None:
        raise UserError(
            f"no Hugging Face architecture has model.qk_norm={model.qk_norm}, qkv_bias={model.qkv_bias}, "
            f"attention_output_bias={model.attention_output_bias} and mlp_bias={model.mlp_bias} together: it cannot be "
            f"exported"
        )
    divides = model.hidden_size % model.num_attention_heads == 0
    if architecture == "Qwen2ForCausalLM" and (
        not divides or model.kv_channels != model.hidden_size // model.num_attention_heads
    ):
        raise UserError(
            f"model.head_dim={model.kv_channels} cannot be exported with model.qkv_bias: that of Qwen2 is always "
            f"hidden_size / num_attention_heads"
        )
    if architecture == "LlamaForCausalLM" and not divides:
        raise UserError(
            f"model.hidden_size={model.hidden_size} cannot be exported: Hugging Face's Llama requires a multiple of "
            f"num_attention_heads={model.num_attention_heads}"
        )
    return architecture


def to_hf_config(
    model: GPTConfig, *, dtype: str, token_ids: dict[str, Any], original: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of config.json, in the form that transformers 4 and 5 and vLLM all read.

    `token_ids` has bos_token_id, eos_token_id and pad_token_id. Fields that do not affect the computation are kept from
    `original`, the config.json that the model was imported from. Raises UserError when no supported architecture
    computes the same as the model.
    """
    architecture = architecture_of(model)
    config = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "torch_dtype": dtype,
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        **write_rope(model, original),
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.attention_dropout,
        "use_cache": True,
    }
    if architecture != "Qwen2ForCausalLM":
        config |= {"head_dim": model.kv_channels, "attention_bias": model.qkv_bias}
    if architecture == "LlamaForCausalLM":
        config["mlp_bias"] = model.mlp_bias
    else:
        config["use_sliding_window"] = False
    return {**config, **kept_fields(original or {}), **token_ids}


def _architecture_in(config: dict[str, Any], source: Path) -> str:
    architecture: str = config["architectures"][0]
    if config.get("model_type", MODEL_TYPES[architecture]) != MODEL_TYPES[architecture]:
        raise UserError(
            f"{source}: model_type={reprlib.repr(config['model_type'])} is not that of {architecture} "
            f"({MODEL_TYPES[architecture]!r}), and transformers uses model_type: correct one of them"
        )
    return architecture


def _biases(config: dict[str, Any], architecture: str, source: Path) -> dict[str, Any]:
    """The fields of GPTConfig for the biases of a config.json."""
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if mlp and architecture != "LlamaForCausalLM":
        raise UserError(f"{source}: mlp_bias=True is not supported: {architecture} has no such biases")
    if architecture == "Qwen2ForCausalLM":
        if attention:
            raise UserError(
                f"{source}: attention_bias=True is not supported: {architecture} always has biases on queries, keys "
                f"and values, and never behind attention"
            )
        return {"qkv_bias": True}
    return {"qkv_bias": attention, "attention_output_bias": attention, "mlp_bias": mlp}


def _query_groups(config: dict[str, Any], architecture: str) -> int:
    default = None if architecture == "LlamaForCausalLM" else 32  # transformers' own, where the field is absent
    return config.get("num_key_value_heads", default) or config["num_attention_heads"]


def from_hf_config(config: dict[str, Any], source: Path) -> GPTConfig:
    """The GPTConfig for a config.json, which `source` names in messages.

    Raises UserError when the model needs a feature that is not supported.
    """
    architecture = _architecture_in(config, source)
    missing = [name for name in _SHAPE_FIELDS if config.get(name) is None]
    if missing:
        raise UserError(f"{source}: {', '.join(missing)} missing: this is no complete config.json")
    for name in (*_SHAPE_FIELDS, "num_key_value_heads", "head_dim"):
        if not isinstance(config.get(name), int | None):
            raise UserError(f"{source}: {name}={reprlib.repr(config[name])} is not a number: this is no config.json")
    refuse_unsupported({"model_type": MODEL_TYPES[architecture], **config}, source)
    epsilon, init_std = config.get("rms_norm_eps"), config.get("initializer_range")
    return GPTConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=_query_groups(config, architecture),
        head_dim=config.get("head_dim") or (128 if architecture == "Qwen3ForCausalLM" else None),
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        norm_epsilon=1e-6 if epsilon is None else float(epsilon),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        init_std=0.02 if init_std is None else float(init_std),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
        **_biases(config, architecture, source),
        **read_rope(config, source),
    )
