"""The plug-in by which vLLM knows recurrent models: an entry point of this package in `vllm.general_plugins`.

vLLM calls `register` in each of its processes, before it reads a config.json.
"""

import importlib.metadata
import os
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.generation.api import EngineOptions
from megatron_tpt.generation.models import is_recurrent, load_model_config
from megatron_tpt.models.spec import register_classes

_GROUP = "vllm.general_plugins"
_NAME = "recurrent_gpt"
"""Of the plug-in, and `model_type` of the models."""
_ARCHITECTURE = "RecurrentGPTForCausalLM"


def register() -> None:
    """Register the configuration and, without importing it, the model."""
    from vllm import ModelRegistry

    register_classes(models=False)
    ModelRegistry.register_model(_ARCHITECTURE, f"megatron_tpt.generation.vllm_recurrent:{_ARCHITECTURE}")


def num_cached_layers(config: Any) -> int:
    """Layers that a token passes in a model with this configuration; each keeps keys and values."""
    if config.model_type != _NAME:
        return int(config.num_hidden_layers)
    if config.num_recurrences < 1:
        raise ValueError(f"num_recurrences={config.num_recurrences} must be 1 or more")
    return config.num_prelude_layers + config.num_recurrences * config.num_block_layers + config.num_coda_layers


def lacks_biases(config: Any) -> bool:
    """Whether a recurrent model has biases that vLLM's layers of its parent do not have."""
    return bool(config.attention_bias) and config.parent_model_type in ("qwen3", "olmo2")


def recurrence_arguments(options: EngineOptions) -> dict[str, Any]:
    """vLLM's arguments for `options.num_recurrences`.

    Raises UserError for a recurrent model that vLLM cannot run, or for which it would not find this plug-in, and for a
    depth of any other model.
    """
    if is_recurrent(options):
        _check_installed()
        if lacks_biases(load_model_config(options.model)):
            raise UserError(
                f"{options.model}: attention_bias is not supported in vLLM with layers of this kind: choose the engine "
                f'"transformers"'
            )
    if options.num_recurrences is None:
        return {}
    return {"hf_overrides": {"num_recurrences": options.num_recurrences}}


def _check_installed() -> None:
    if not importlib.metadata.entry_points(group=_GROUP, name=_NAME):
        raise UserError(
            "vLLM does not find the plug-in for recurrent models: this package was installed before it had one; "
            "install it again (pip install -e .)"
        )
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and _NAME not in chosen.split(","):
        raise UserError(f"VLLM_PLUGINS={chosen} excludes the plug-in for recurrent models: add {_NAME}, or unset it")
