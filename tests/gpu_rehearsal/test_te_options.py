"""What we, and Megatron Core for us, give to Transformer Engine is there, and what is left alone is as we rely on.

Its recipes drop arguments that they do not know, so that their fields are looked at. What the layers are built with is
not here: a name that they lack is an error in test_construction.py.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import hopper  # noqa: F401  (before Megatron Core)
import pytest
import transformer_engine.pytorch as te
from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Format
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
from transformer_engine.pytorch.cpu_offload import get_cpu_offload_context
from transformer_engine.pytorch.module import base
from transformer_engine.pytorch.quantization import DelayedScalingRecipeState, FP8GlobalStateManager

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.models.gpt.build import core_settings
from megatron_tpt.models.precision import SCALING_BUFFERS, SCALING_DIRECTIONS, TE_CHECKS
from megatron_tpt.recipes.pretrain import PretrainRecipe

from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer.transformer_config import TransformerConfig

KINDS = {
    "delayed": "delayed",
    "tensorwise": "float8_current_scaling",
    "blockwise": "float8_block_scaling",
    "mxfp8": "mxfp8",
}
"""Our names of the FP8 recipes, and the questions by which Transformer Engine tells its own apart."""
LEFT_ALONE: dict[str, dict[str, Any]] = {
    "delayed": {"margin": 0, "reduce_amax": True, "scaling_factor_compute_algo": None},
    "tensorwise": {"use_power_2_scales": False},
    "blockwise": {
        "use_f32_scales": False,  # powers of two
        "x_block_scaling_dim": 1,
        "w_block_scaling_dim": 2,
        "grad_block_scaling_dim": 1,
    },
    "mxfp8": {"margin": 0},
}


@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("name", KINDS)
def test_a_setting_becomes_the_recipe_that_it_names(name: str, fp8_format: str) -> None:
    history = {"fp8_amax_history": 77} if name == "delayed" else {}
    raw = {"model": {"vocab_size": 1000}, "training": {"fp8": name, "fp8_format": fp8_format, **history}}
    asked = recipe_from_dict(PretrainRecipe, raw)
    settings = core_settings(asked.model, asked.parallel, asked.training, transformer_engine=True, on_gpu=True)
    found = get_fp8_recipe(TransformerConfig(**settings))
    assert [kind for kind in KINDS.values() if getattr(found, kind)()] == [KINDS[name]]
    assert found.fp8_format == {"hybrid": Format.HYBRID, "e4m3": Format.E4M3}[fp8_format]
    if name == "delayed":
        assert (found.amax_history_len, found.amax_compute_algo) == (77, "max")
    # Products of all three passes are in FP8, attention is not.
    expected = {"fp8_dpa": False, "fp8_mha": False, "backward_override": None, **LEFT_ALONE[name]}
    assert {field: getattr(found, field) for field in expected} == expected


def test_a_format_is_what_its_name_says() -> None:
    largest = {name: (one.value.max_fwd, one.value.max_bwd) for name, one in Format.__members__.items()}
    assert largest["HYBRID"] == (448, 57344) and largest["E4M3"] == (448, 448)


CALLS: dict[Callable, tuple[str, ...]] = {
    te.autocast: ("enabled", "recipe"),
    te.fp8_autocast: ("enabled", "fp8_recipe", "fp8_group"),
    te.fp8_model_init: ("enabled", "recipe", "preserve_high_precision_init_val"),
    te.Linear.__init__: ("in_features", "out_features", "bias", "params_dtype", "device"),
    te.DotProductAttention.__init__: ("cp_group", "cp_global_ranks", "cp_stream", "cp_comm_type"),
    te.DotProductAttention.forward: (
        "attn_mask_type",
        "qkv_format",
        "cu_seqlens_q",
        "cu_seqlens_kv",
        "max_seqlen_q",
        "max_seqlen_kv",
    ),
    apply_rotary_pos_emb: ("tensor_format", "interleaved", "fused", "cu_seqlens", "cp_size", "cp_rank"),
    get_cpu_offload_context: ("enabled", "num_layers", "model_layers", "retain_pinned_cpu_buffers"),
    base.TransformerEngineBaseModule.init_fp8_meta_tensors: ("recipe",),
    DelayedScaling: ("fp8_format", "amax_history_len", "amax_compute_algo"),
    Float8CurrentScaling: ("fp8_format",),
    Float8BlockScaling: ("fp8_format",),
}


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__qualname__)
def test_what_is_called_takes_the_arguments_that_it_is_given(function: Callable) -> None:
    assert set(CALLS[function]) <= inspect.signature(function).parameters.keys()


@pytest.mark.parametrize("name", KINDS)
def test_every_fp8_recipe_has_its_question_to_the_device(name: str) -> None:
    parameters = inspect.signature(getattr(te, TE_CHECKS[name])).parameters
    assert "return_reason" in parameters


def test_activations_alone_are_offloaded_by_place() -> None:
    # Megatron Core gives them without their names.
    order = list(inspect.signature(get_cpu_offload_context).parameters)
    assert order[3:6] == ["offload_activations", "offload_weights", "double_buffering"]


def test_every_exchange_of_context_parallelism_is_one_of_transformer_engines() -> None:
    hint = typing.get_type_hints(ParallelConfig)["context_parallel_exchange"]
    documented = inspect.getsource(te.DotProductAttention)
    assert all(f'"{name}"' in documented for name in typing.get_args(hint))


def test_what_delayed_scaling_keeps_is_what_is_saved() -> None:
    assert DelayedScalingRecipeState._persistent_state_buffers == SCALING_BUFFERS
    assert tuple(map(FP8GlobalStateManager.get_meta_tensor_key, (True, False))) == SCALING_DIRECTIONS


def test_unrounded_values_are_kept_under_the_name_that_is_looked_for() -> None:
    assert "get_high_precision_init_val" in inspect.getsource(base)
