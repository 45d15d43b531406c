"""config.json of Hugging Face's models, from and to our description of a model, by the family that computes it."""

import reprlib
from pathlib import Path
from typing import Any

from megatron_tpt.config.model import ModelConfig
from megatron_tpt.errors import UserError
from megatron_tpt.models.hugging_face import HuggingFaceAdapter
from megatron_tpt.models.spec import all_specs, spec_of


def adapter_of[C: ModelConfig](model: C) -> HuggingFaceAdapter[C]:
    """The adapter of a model's family. Raises UserError for a family that has none."""
    adapter = spec_of(model).hugging_face()
    if adapter is None:
        raise UserError(
            f"model.family={model.family} has no Hugging Face counterpart: its checkpoints cannot be exported"
        )
    return adapter


def adapter_for(config: dict[str, Any], source: Path) -> HuggingFaceAdapter[Any]:
    """The adapter of the family that computes what a config.json describes, which `source` names in messages. Raises
    UserError when there is none."""
    adapters = [adapter for spec in all_specs() if (adapter := spec.hugging_face()) is not None]
    names = config.get("architectures") or []
    found = [adapter for adapter in adapters if len(names) == 1 and names[0] in adapter.architectures]
    if not found:
        known = ", ".join(name for adapter in adapters for name in adapter.architectures)
        raise UserError(f"{source}: architectures {reprlib.repr(names)} are not supported: use a model of {known}")
    return found[0]


def from_hf_config(config: dict[str, Any], source: Path) -> ModelConfig:
    """The model of a config.json. Raises UserError when it needs something that our models lack."""
    model: ModelConfig = adapter_for(config, source).from_config(config, source)
    return model


def to_hf_config(
    model: ModelConfig, *, dtype: str, token_ids: dict[str, Any], original: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of config.json, in the form that transformers 4 and 5 and vLLM all read.

    `token_ids` has bos_token_id, eos_token_id and pad_token_id; of the config.json that the model was imported from,
    `original`, the fields are kept that do not concern what it computes. Raises UserError when no supported
    architecture computes what the model does.
    """
    return adapter_of(model).to_config(model, dtype=dtype, token_ids=token_ids, original=original)
