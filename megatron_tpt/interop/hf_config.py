"""config.json of Hugging Face's Llama, Qwen2 and Qwen3 (dense) models, from and to our description of a model."""

from pathlib import Path
from typing import Any

from megatron_tpt.config.model import ModelConfig
from megatron_tpt.errors import UserError

# Megatron Core's constants for Llama 3's change of the rotary frequencies.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


def architecture_of(model: ModelConfig) -> str:
    """The Hugging Face class that computes the same. Raises UserError when there is none."""
    if model.qkv_bias and model.qk_norm:
        raise UserError(
            "no Hugging Face architecture has model.qkv_bias and model.qk_norm: export one with at most one"
        )
    divides = model.hidden_size % model.num_attention_heads == 0
    if model.qk_norm:
        return "Qwen3ForCausalLM"
    if model.qkv_bias:
        if not divides or model.kv_channels != model.hidden_size // model.num_attention_heads:
            raise UserError(
                f"model.head_dim={model.kv_channels} cannot be exported with model.qkv_bias: that of Qwen2 is always "
                f"hidden_size / num_attention_heads"
            )
        return "Qwen2ForCausalLM"
    if not divides:
        raise UserError(
            f"model.hidden_size={model.hidden_size} cannot be exported: Hugging Face's Llama wants a multiple of "
            f"num_attention_heads={model.num_attention_heads}"
        )
    return "LlamaForCausalLM"


def to_hf_config(model: ModelConfig, *, dtype: str, bos_id: int | None, eos_id: int) -> dict[str, Any]:
    """The content of config.json, in the form that transformers 4 and 5 and vLLM all read.

    Raises UserError when no supported architecture computes what the model does.
    """
    architecture = architecture_of(model)
    scaling = None
    if model.rope_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3_ROPE}
    config = {
        "architectures": [architecture],
        "model_type": _MODEL_TYPES[architecture],
        "torch_dtype": dtype,
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
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.attention_dropout,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }
    if architecture == "LlamaForCausalLM":
        return {**config, "head_dim": model.kv_channels, "attention_bias": False, "mlp_bias": False}
    if architecture == "Qwen2ForCausalLM":
        return {**config, "use_sliding_window": False}
    return {**config, "head_dim": model.kv_channels, "attention_bias": False, "use_sliding_window": False}


def _refuse_unsupported(config: dict[str, Any], source: Path) -> None:
    architectures = config.get("architectures") or []
    if len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise UserError(
            f"{source}: architectures {architectures} are not supported: use a model of {', '.join(ARCHITECTURES)}"
        )
    off = {
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
        "hidden_act": ("silu",),
        "partial_rotary_factor": (1.0, None),
    }
    for name, supported in off.items():
        if name in config and config[name] not in supported:
            raise UserError(f"{source}: {name}={config[name]!r} is not supported, only {supported[0]!r} is")
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        raise UserError(f"{source}: layer_types other than full_attention are not supported")


def _rope(config: dict[str, Any], source: Path) -> tuple[float, float | None]:
    """Rotary base and Llama 3's factor, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise UserError(f"{source}: rope type {kind!r} is not supported, only 'default' and 'llama3' are")
    for name, value in LLAMA3_ROPE.items():
        if rope.get(name) != value:
            raise UserError(f"{source}: {name}={rope.get(name)} of the llama3 rope is not supported, only {value:g} is")
    return base, float(rope["factor"])


def from_hf_config(config: dict[str, Any], source: Path) -> ModelConfig:
    """Our description of the model of a config.json, which `source` names in messages.

    Raises UserError when the model needs something that our models lack.
    """
    _refuse_unsupported(config, source)
    needed = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    missing = [name for name in needed if config.get(name) is None]
    if missing:
        raise UserError(f"{source}: {', '.join(missing)} missing: this is no complete config.json")
    architecture = config["architectures"][0]
    rotary_base, rope_scaling_factor = _rope(config, source)
    return ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim") or (128 if architecture == "Qwen3ForCausalLM" else None),
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        rotary_base=rotary_base,
        rope_scaling_factor=rope_scaling_factor,
        norm_epsilon=float(config.get("rms_norm_eps") or 1e-6),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        init_std=float(config.get("initializer_range") or 0.02),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
    )
