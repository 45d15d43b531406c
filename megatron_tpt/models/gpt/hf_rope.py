"""Conversion of rotary positions between GPTConfig and Hugging Face's config.json.

transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 one dictionary, `rope_parameters`. If both are
present, transformers uses `rope_scaling`, and so does this module. Exports have all three, with the same meaning.
"""

import reprlib
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.models.gpt.rope import yarn_mscale

_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned"}


def _parameters(config: dict[str, Any]) -> dict[str, Any]:
    """All rotary settings in one dictionary, as in transformers 5."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if rope.get("rope_theta") is None:
        theta = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta")
        rope["rope_theta"] = 10000.0 if theta is None else theta
    if config.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return rope


def _kind(rope: dict[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def read_rope(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """The fields of GPTConfig for the rotary positions of a config.json.

    Raises UserError for kinds and settings that are not supported.
    """
    rope = _parameters(config)
    kind = _kind(rope)
    if kind not in _NEEDED:
        raise UserError(f"{source}: rope type {reprlib.repr(kind)} is not supported, only {', '.join(_NEEDED)} are")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError(
            f"{source}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported, only 1.0 is"
        )
    known = _ALWAYS.union(*_NEEDED.values(), *_OPTIONAL.values())
    if unknown := sorted(rope.keys() - known):
        raise UserError(
            f"{source}: {unknown[0]}={reprlib.repr(rope[unknown[0]])} of the rotary positions is not supported"
        )
    for name in _NEEDED[kind]:
        if rope.get(name) is None:
            raise UserError(f"{source}: {name} of the {kind} rope is missing: this is no complete config.json")
    fields: dict[str, Any] = {"rotary_base": float(rope["rope_theta"])}
    if kind == "default":
        return fields
    fields |= {"rope_scaling_type": kind, "rope_scaling_factor": float(rope["factor"])}
    if kind in ("llama3", "yarn"):
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        fields["rope_original_context"] = int(original)
    if kind == "llama3":
        fields |= {f"rope_{name}": float(rope[name]) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        fields |= {f"rope_{name}": float(rope.get(name) or default) for name, default in _YARN_BETAS.items()}
        truncate = rope.get("truncate", True)
        fields |= {"rope_truncate": bool(truncate), "rope_attention_factor": _attention_factor(rope)}
    return fields


_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def _attention_factor(rope: dict[str, Any]) -> float | None:
    """The factor on cosines and sines; None if it follows from the scaling factor alone."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(rope["factor"], mscale) / yarn_mscale(rope["factor"], all_dim)
    return None


def describe_rope(config: dict[str, Any]) -> list[str]:
    """Notes about settings of the rotary positions that have no effect, in transformers neither."""
    rope = _parameters(config)
    used = {*_ALWAYS, *_NEEDED.get(_kind(rope), ()), *_OPTIONAL.get(_kind(rope), ())}
    unused = sorted(name for name in rope.keys() - used if rope[name] is not None)
    lines = [f"{', '.join(unused)}: no effect with rope type {_kind(rope)}, not carried over"] if unused else []
    both = config.get("rope_scaling") and config.get("rope_parameters")
    if both and _parameters({**config, "rope_scaling": None}) != rope:
        lines.append("rope_parameters differs from rope_scaling: rope_scaling counts, as in transformers")
    return lines


def write_rope(model: GPTConfig, original: dict[str, Any] | None = None) -> dict[str, Any]:
    """rope_theta, rope_scaling and rope_parameters of a config.json; in the form of the `original` config.json if that
    has the same meaning."""
    theta, scaling = model.rotary_base, _scaling(model)
    if original and scaling and _says(original, model):
        scaling = {**scaling, **{name: value for name, value in _parameters(original).items() if name != "rope_theta"}}
        words = _parameters(original).keys() | {"rope_type", "original_max_position_embeddings"}
        scaling = {name: value for name, value in scaling.items() if name in words}
    parameters = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters}


def _says(original: dict[str, Any], model: GPTConfig) -> bool:
    fields = read_rope(original, Path("config.json"))
    return all(getattr(model, name) == value for name, value in fields.items())


def _scaling(model: GPTConfig) -> dict[str, Any] | None:
    if model.rope_scaling_factor is None:
        return None
    scaling: dict[str, Any] = {"rope_type": model.rope_scaling_type, "factor": model.rope_scaling_factor}
    if model.rope_scaling_type == "linear":
        return scaling
    scaling["original_max_position_embeddings"] = model.rope_original_context
    if model.rope_scaling_type == "llama3":
        names = ("low_freq_factor", "high_freq_factor")
        return scaling | {name: getattr(model, f"rope_{name}") for name in names}
    scaling |= {name: getattr(model, f"rope_{name}") for name in _YARN_BETAS}
    if not model.rope_truncate:
        scaling["truncate"] = False
    if model.rope_attention_factor is not None:
        scaling["attention_factor"] = model.rope_attention_factor
    return scaling
