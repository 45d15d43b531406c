"""Translates precision, recomputation and fused kernels to Megatron Core's settings.

Features that are requested but not available on this machine are errors, never silent fallbacks.
"""

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.errors import UserError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCALING_DIRECTIONS, SCALING_BUFFERS = ("scaling_fwd", "scaling_bwd"), ("scale", "amax_history")
"""Transformer Engine's names for what delayed scaling keeps in a module."""
TE_CHECKS = {
    "delayed": "is_fp8_available",
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}


def fp8_settings(training: TrainingConfig) -> dict[str, Any]:
    """Fields of TransformerConfig that choose the FP8 recipe; none for training without FP8."""
    if training.fp8 == "none":
        return {}
    settings: dict[str, Any] = {
        "fp8": training.fp8_format,
        "fp8_recipe": training.fp8,
        "fp8_param": training.fp8_param_gather,
    }
    if training.fp8 == "delayed":
        settings |= {"fp8_amax_history_len": training.fp8_amax_history, "fp8_amax_compute_algo": "max"}
    if training.bf16_layers_at_start or training.bf16_layers_at_end:
        settings |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": training.bf16_layers_at_start,
            "num_layers_at_end_in_bf16": training.bf16_layers_at_end,
        }
    return settings


def unrounded_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The unrounded values of parameters that are kept in FP8, by name. Transformer Engine keeps them until the
    optimizer creates its main weights from them; code that sets such a parameter must set both."""
    parameters = dict(model.named_parameters())
    return {
        name: parameter.get_high_precision_init_val()
        for name, parameter in parameters.items()
        if hasattr(parameter, "get_high_precision_init_val")
    }


def scaling_statistics(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What delayed scaling keeps in one module of the largest values of the last steps, on the CPU; nothing where it
    keeps none, or has not run yet."""
    states = {name: state for name, state in getattr(module, "fp8_meta", {}).items() if name in SCALING_DIRECTIONS}
    return {
        f"{name}.{buffer}": getattr(state, buffer).cpu()
        for name, state in states.items()
        for buffer in SCALING_BUFFERS
        if hasattr(state, buffer)
    }


def set_scaling_statistics(module: Any, statistics: dict[str, torch.Tensor], config: "TransformerConfig") -> None:
    """Have a module of a new model continue with what `scaling_statistics` returned. Transformer Engine would do it
    from a pickle, which may run code: it refuses to, and so do we."""
    if not statistics:
        return
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe = get_fp8_recipe(config)
    recipe.amax_history_len = len(statistics["scaling_fwd.amax_history"])  # the first step changes it to the recipe's
    module.fp8_meta["recipe"] = recipe
    module.fp8_meta["num_gemms"] = len(statistics["scaling_fwd.scale"]) // 3  # each has an input, weights, an output
    module.init_fp8_meta_tensors(recipe)
    for name, value in statistics.items():
        direction, buffer = name.split(".")
        getattr(module.fp8_meta[direction], buffer).copy_(value)


def recompute_settings(training: TrainingConfig) -> dict[str, Any]:
    """Fields of TransformerConfig that choose which activations are recomputed, and which are offloaded to the CPU."""
    if training.recompute == "none":
        layers = training.cpu_offload_layers
        return {"cpu_offloading": True, "cpu_offloading_num_layers": layers} if layers else {}
    if training.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(training.recompute_modules)}
    method, layers = ("uniform", 1) if training.recompute == "full" else ("block", training.recompute_layers)
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}


def require_active(training: TrainingConfig, *, transformer_engine: bool) -> None:
    """Raises UserError when FP8 or CPU offload is requested but not available on this machine."""
    if training.cpu_offload_layers and not transformer_engine:
        raise UserError("training.cpu_offload_layers needs Transformer Engine on a GPU: set it to 0 here")
    if training.fp8 == "none":
        return
    if not transformer_engine:
        raise UserError(f"training.fp8={training.fp8} needs Transformer Engine on a GPU: give --training.fp8=none here")
    import transformer_engine.pytorch as te

    is_active, reason = getattr(te, TE_CHECKS[training.fp8])(return_reason=True)
    if not is_active:
        raise UserError(
            f"training.fp8={training.fp8} is not active on {torch.cuda.get_device_name()}: {' '.join(reason.split())}; "
            f"give another training.fp8, or none"
        )


def fuses_gradient_accumulation() -> bool:
    """Whether weight gradients are accumulated within their matrix products: on a GPU with apex's extension, which
    Megatron Core's output layer needs."""
    return torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def describe_kernels(config: "TransformerConfig") -> str:
    """One line about the device, kernels and precision of a model, for the log."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    kernels = "Megatron Core's own kernels"
    if config.transformer_impl == "transformer_engine":
        kernels = f"Transformer Engine {importlib.metadata.version('transformer-engine')}"
    precision = "bf16" if config.bf16 else "fp32"
    if config.fp8:
        precision += f" with {config.fp8_recipe} FP8 ({config.fp8})"
    fusion = "fused" if config.gradient_accumulation_fusion else "not fused (apex is not there)"
    return f"{device}: {kernels}, {precision}, gradient accumulation {fusion}"
