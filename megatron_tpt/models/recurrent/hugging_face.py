"""The Hugging Face adapter of recurrent models: their parent's layers and config.json, and classes of our own."""

import dataclasses
import reprlib
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.models.gpt.hf_config import MODEL_TYPES
from megatron_tpt.models.gpt.hugging_face import GPTAdapter, row_of
from megatron_tpt.models.hugging_face import HuggingFaceAdapter, Row, Same
from megatron_tpt.models.recurrent.config import ADAPTER_KEY, VALIDATION_SEED, RecurrentConfig

MODEL_TYPE, ARCHITECTURE = "recurrent_gpt", "RecurrentGPTForCausalLM"
_CODE = ("configuration_recurrent_gpt.py", "modeling_recurrent_gpt.py", "state.py")
_AUTO_MAP = {
    "AutoConfig": "configuration_recurrent_gpt.RecurrentGPTConfig",
    "AutoModel": "modeling_recurrent_gpt.RecurrentGPTModel",
    "AutoModelForCausalLM": f"modeling_recurrent_gpt.{ARCHITECTURE}",
}
_COUNTS = ("num_prelude_layers", "num_block_layers", "num_coda_layers", "num_recurrences")
_OWN = {*_COUNTS, "parent_model_type", "mean_recurrences", "initial_state_std", "initial_state_seed"}
_WITHOUT_MEANING = {"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"}
"""Fields of parents that transformers would apply to the cache, whose layers are others here."""


class RecurrentAdapter(HuggingFaceAdapter[RecurrentConfig]):
    """The adapter of the family."""

    architectures = (ARCHITECTURE,)

    @property
    def code(self) -> tuple[Path, ...]:
        return tuple(Path(__file__).with_name(name) for name in _CODE)

    def from_config(self, config: dict[str, Any], source: Path) -> RecurrentConfig:
        parent = _parent_config(config, source)
        if missing := [name for name in _COUNTS if not isinstance(config.get(name), int)]:
            raise UserError(f"{source}: {', '.join(missing)} missing: this is no complete config.json")
        if config.get("initial_state_seed", VALIDATION_SEED) != VALIDATION_SEED:
            seed = reprlib.repr(config["initial_state_seed"])
            raise UserError(f"{source}: initial_state_seed={seed} is not supported, only {VALIDATION_SEED} is")
        prelude, block, coda, recurrences = (config[name] for name in _COUNTS)
        if prelude + block + coda != (total := config.get("num_hidden_layers")):
            raise UserError(
                f"{source}: num_hidden_layers={reprlib.repr(total)} is not the sum of num_prelude_layers, "
                f"num_block_layers and num_coda_layers: restore it"
            )
        gpt = GPTAdapter().from_config(parent, source)
        fields = {field.name: getattr(gpt, field.name) for field in dataclasses.fields(GPTConfig)}
        fields |= {"family": "recurrent", "prelude_layers": prelude, "coda_layers": coda}
        fields["test_recurrences"] = recurrences
        fields["mean_recurrences"] = config.get("mean_recurrences") or recurrences
        if config.get("initial_state_std") is not None:
            fields["state_std"] = float(config["initial_state_std"])
        return RecurrentConfig(**fields)

    def to_config(
        self, model: RecurrentConfig, *, dtype: str, token_ids: dict[str, Any], original: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        parent = GPTAdapter().to_config(model, dtype=dtype, token_ids=token_ids, original=original)
        kept = {name: value for name, value in parent.items() if name not in _WITHOUT_MEANING | _OWN}
        return {
            **kept,
            "architectures": [ARCHITECTURE],
            "model_type": MODEL_TYPE,
            "auto_map": _AUTO_MAP,
            "parent_model_type": parent["model_type"],
            "num_prelude_layers": model.prelude_layers,
            "num_block_layers": model.recurrent_layers,
            "num_coda_layers": model.coda_layers,
            "num_recurrences": model.default_recurrences,
            "mean_recurrences": model.mean_recurrences,
            "initial_state_std": model.state_std,
            "initial_state_seed": VALIDATION_SEED,
        }

    def notes(self, config: dict[str, Any]) -> list[str]:
        return GPTAdapter().notes(_without_own(config))

    def rows(self, model: RecurrentConfig) -> list[Row]:
        return [
            Row(weight, ("model.adapter.weight",), Same()) if weight.key == ADAPTER_KEY else row_of(model, weight)
            for weight in model.weights()
            if not weight.is_tied
        ]

    def layer_name(self, model: RecurrentConfig, layer: int) -> str:
        coda = model.prelude_layers + model.recurrent_layers
        if layer < model.prelude_layers:
            return f"prelude.{layer}"
        return f"block.{layer - model.prelude_layers}" if layer < coda else f"coda.{layer - coda}"


def _without_own(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _OWN | {"auto_map"}}


def _parent_config(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """The config.json of a model with the same layers, passed once. Raises UserError for an unknown parent."""
    if config.get("model_type", MODEL_TYPE) != MODEL_TYPE:
        raise UserError(
            f"{source}: model_type={reprlib.repr(config['model_type'])} is not that of {ARCHITECTURE} "
            f"({MODEL_TYPE!r}), and transformers uses model_type: correct one of them"
        )
    parents = {model_type: architecture for architecture, model_type in MODEL_TYPES.items()}
    name = config.get("parent_model_type")
    if not isinstance(name, str) or name not in parents:
        raise UserError(
            f"{source}: parent_model_type={reprlib.repr(name)} is not supported: use a model of {', '.join(parents)}"
        )
    return {**_without_own(config), "architectures": [parents[name]], "model_type": name}
