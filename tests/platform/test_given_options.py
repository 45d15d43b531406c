"""Every option of Megatron Core and torch that we give is there, and those that we leave alone are as we rely on.

`make gpu-rehearsal` runs these again with the versions of its own environment, and others for Transformer Engine.
"""

import dataclasses
import importlib.util
import inspect
import mmap
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_tpt import platform  # noqa: F401  (before Megatron Core)
from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.config.optimizer import OptimizerConfig
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.models.gpt.build import core_settings
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.optimizer import buffer_settings

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import Fp8Recipe
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.transformer.transformer_config import TransformerConfig


def choices(kind: type, field: str) -> tuple[Any, ...]:
    """What a field of a configuration may be."""
    hint = typing.get_type_hints(kind)[field]
    literals = [hint, *typing.get_args(hint)]
    return tuple(value for one in literals if typing.get_origin(one) is Literal for value in typing.get_args(one))


def defaults(kind: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(kind)}


def settings(**training: object) -> dict[str, Any]:
    """The fields of TransformerConfig on a GPU."""
    raw = {"model": {"vocab_size": 1000, "num_layers": 8}, "training": {"sequence_length": 256, **training}}
    recipe = recipe_from_dict(PretrainRecipe, raw)
    return core_settings(recipe.model, recipe.parallel, recipe.training, transformer_engine=True, on_gpu=True)


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"fp8": "delayed"},
        {"fp8": "blockwise", "fp8_param_gather": True, "bf16_layers_at_start": 1},
        {"recompute": "full"},
        {"recompute": "selective"},
        {"cpu_offload_layers": 2},
    ],
)
def test_what_the_model_is_given_are_fields_of_megatron_core(training: dict) -> None:
    assert settings(**training).keys() <= defaults(TransformerConfig).keys()


def test_what_the_model_is_not_given_is_as_we_rely_on() -> None:
    expected = {
        "fp8_wgrad": True,  # the gradients of weights are products in FP8 too
        "fp8_margin": 0,
        "fp8_dot_product_attention": False,  # attention stays in bf16
        "fp8_multi_head_attention": False,
        "fp8_output_proj": False,  # and so does the output matrix
        "tp_only_amax_red": False,  # ranks agree on the largest values
        "cpu_offloading_activations": True,  # training.cpu_offload_layers: activations,
        "cpu_offloading_weights": False,  # not weights
        "distribute_saved_activations": False,
        "cross_entropy_fusion_impl": "native",
        "tp_comm_overlap": False,
        "init_model_with_meta_device": False,
        "deterministic_mode": False,
    }
    found = defaults(TransformerConfig)
    assert {name: found[name] for name in expected} == expected
    assert found["attention_backend"].name == "auto", "Transformer Engine chooses among its own kernels"
    assert not set(expected) & settings(fp8="delayed").keys(), "what we give has no default to rely on"


def test_every_choice_of_ours_is_one_of_megatron_cores() -> None:
    fp8 = set(choices(TrainingConfig, "fp8")) - {"none"}
    assert fp8 <= {recipe.value for recipe in Fp8Recipe}
    assert set(choices(TrainingConfig, "fp8_format")) == {"hybrid", "e4m3"}
    source = inspect.getsource(TransformerConfig.__post_init__)
    modules = typing.get_args(typing.get_type_hints(TrainingConfig)["recompute_modules"])[0]
    assert all(f'"{name}"' in source for name in typing.get_args(modules))
    exchanges = set(choices(ParallelConfig, "context_parallel_exchange"))
    documented = inspect.getsource(TransformerConfig)
    assert all(f'"{name}"' in documented for name in exchanges)
    assert set(choices(ParallelConfig, "fsdp")) - {"none"} <= {"no_shard", "optim", "optim_grads", "optim_grads_params"}
    schedules = inspect.getsource(OptimizerParamScheduler.get_lr)
    assert all(f"'{name}'" in schedules or f'"{name}"' in schedules for name in ("linear", "cosine", "constant", "WSD"))
    assert set(choices(OptimizerConfig, "schedule")) <= {"linear", "cosine", "constant", "wsd", "inverse-square-root"}


CALLS: dict[Callable, tuple[str, ...]] = {
    parallel_state.initialize_model_parallel: (
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "order",
        "distributed_timeout_minutes",
        "create_gloo_process_groups",
    ),
    GPTModel.__init__: (
        "config",
        "transformer_layer_spec",
        "vocab_size",
        "max_sequence_length",
        "pre_process",
        "post_process",
        "vp_stage",
        "share_embeddings_and_output_weights",
        "position_embedding_type",
        "rotary_base",
    ),
    gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec: ("qk_layernorm",),
    gpt_layer_specs.get_gpt_layer_local_spec: ("normalization", "qk_layernorm"),
    DistributedDataParallel.__init__: ("disable_bucketing", "full_param_layout"),
    forward_backward_no_pipelining: (
        "forward_step_func",
        "data_iterator",
        "model",
        "num_microbatches",
        "seq_length",
        "micro_batch_size",
        "forward_only",
    ),
    get_megatron_optimizer: ("config_overrides",),
    OptimizerParamScheduler.__init__: (
        "init_lr",
        "max_lr",
        "min_lr",
        "lr_warmup_steps",
        "lr_decay_steps",
        "lr_decay_style",
        "start_wd",
        "end_wd",
        "wd_incr_steps",
        "wd_incr_style",
        "wsd_decay_steps",
        "lr_wsd_decay_style",
    ),
    PackedSeqParams: ("qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"),
    dist_checkpointing.save: ("async_sharded_save", "async_strategy", "content_metadata"),
    torch.distributed.init_process_group: ("timeout", "store", "rank", "world_size"),
    torch.cuda.memory._record_memory_history: ("enabled", "max_entries"),
    torch.cuda.power_draw: ("device",),
    torch.cuda.Event: ("enable_timing",),
    torch.nn.RMSNorm: ("eps",),
}


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__qualname__)
def test_what_is_called_takes_the_arguments_we_give(function: Callable) -> None:
    assert set(CALLS[function]) <= inspect.signature(function).parameters.keys()


def test_buffers_and_optimizer_take_what_we_give() -> None:
    recipe = recipe_from_dict(PretrainRecipe, {"model": {"vocab_size": 1000}})
    found = buffer_settings(recipe)
    assert found.grad_reduce_in_fp32 and isinstance(found, DistributedDataParallelConfig)
    assert not found.average_in_collective, "calculate_per_token_loss wants sums"
    assert not found.check_for_nan_in_grad, "faults.* looks for them"
    fields = defaults(CoreOptimizerConfig)
    assert fields["log_num_zeros_in_grad"] is False and fields["use_precision_aware_optimizer"] is False
    assert {"fp8_recipe", "overlap_param_gather", "adam_eps", "muon_momentum", "muon_fp32_matmul_prec"} <= fields.keys()


def test_torch_has_what_is_asked_of_a_gpu() -> None:
    names = "mem_get_info max_memory_allocated max_memory_reserved reset_peak_memory_stats get_rng_state set_rng_state"
    assert all(callable(getattr(torch.cuda, name)) for name in [*names.split(), "set_device", "synchronize"])
    assert callable(torch.cuda.memory._dump_snapshot) and callable(torch.cuda.nccl.version)
    if torch.distributed.is_nccl_available():
        assert callable(torch._C._distributed_c10d._dump_nccl_trace)
    assert importlib.util.find_spec("torch.distributed.flight_recorder.fr_trace") is not None


@pytest.mark.parametrize(
    "name", ["TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "expandable_segments"]
)
def test_torchs_libraries_read_the_variables_we_set(name: str) -> None:
    """Of platform, slurm/train.sbatch and the watchdog: a name that no library knows would have no effect."""
    folder = Path(torch.__file__).parent / "lib"
    libraries = [path for path in folder.glob("lib*.so") if path.name.startswith(("libtorch_", "libc10"))]
    found = False
    for path in libraries:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = found or content.find(name.encode()) >= 0
    assert found, f"none of {[path.name for path in libraries]} has {name}"
