"""Precision and recomputation: what a recipe asks for is what Megatron Core gets, or an error."""

import dataclasses

import pytest
import torch

from megatron_tpt import platform  # noqa: F401  (before Megatron Core)
from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.errors import UserError
from megatron_tpt.models.gpt.build import core_settings, transformer_config
from megatron_tpt.models.precision import describe_kernels, fuses_gradient_accumulation
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.optimizer import buffer_settings

from megatron.core.transformer.transformer_config import TransformerConfig

SHAPE = {"vocab_size": 1000, "num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 512}


def recipe(training: dict, **parallel: object) -> PretrainRecipe:
    raw = {"sequence_length": 256, "global_batch_size": 16, **training}
    return recipe_from_dict(
        PretrainRecipe, {"model": SHAPE, "training": raw, "parallel": parallel, "data": {"train": "prefix"}}
    )


def config_on_gpu(training: dict, **parallel: object) -> TransformerConfig:
    """What Megatron Core would get on a GPU with Transformer Engine, whose own fields cannot be checked here."""
    asked = recipe(training, **parallel)
    asked.check(asked.parallel.model_parallel_size)
    settings = core_settings(asked.model, asked.parallel, asked.training, transformer_engine=True, on_gpu=True)
    assert settings.pop("apply_rope_fusion")
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert settings.keys() <= fields
    return TransformerConfig(**settings)


@pytest.mark.parametrize("name", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_every_fp8_recipe_is_one_of_megatron_core(name: str) -> None:
    config = config_on_gpu({"fp8": name, "fp8_format": "e4m3", "fp8_amax_history": 64})
    assert (config.fp8, config.fp8_recipe, config.bf16) == ("e4m3", name, True)
    assert config.params_dtype == torch.bfloat16 and config.transformer_impl == "transformer_engine"
    if name == "delayed":
        assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (64, "max")
    else:
        config = config_on_gpu({"fp8": name, "bf16_layers_at_start": 2, "bf16_layers_at_end": 1})
        layers = (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16)
        assert (config.fp8, config.first_last_layers_bf16, layers) == ("hybrid", True, (2, 1))


@pytest.mark.parametrize("name", ["delayed", "tensorwise", "blockwise"])
def test_parameters_are_gathered_in_fp8_where_asked(name: str) -> None:
    training = {"fp8": name, "fp8_param_gather": True}
    assert config_on_gpu(training).fp8_param and buffer_settings(recipe(training)).fp8_param_gather
    assert not config_on_gpu({"fp8": name}).fp8_param and not buffer_settings(recipe({"fp8": name})).fp8_param_gather


def test_without_fp8_there_is_none() -> None:
    config = config_on_gpu({})
    assert config.fp8 is None and not config.first_last_layers_bf16 and config.recompute_granularity is None


def test_the_loss_is_fused_on_gpus_in_bf16_alone() -> None:
    # The kernel rounds its gradients to bf16, whatever the logits are.
    for dtype, on_gpu in (("bfloat16", True), ("float32", True), ("bfloat16", False)):
        asked = recipe({"dtype": dtype})
        settings = core_settings(asked.model, asked.parallel, asked.training, transformer_engine=False, on_gpu=on_gpu)
        assert settings["cross_entropy_loss_fusion"] is (dtype == "bfloat16" and on_gpu)


def test_the_softmax_of_the_local_attention_is_not_fused() -> None:
    # The kernel is apex's, which may be missing, and it takes any mask for the causal one.
    for on_gpu in (True, False):
        asked = recipe({})
        settings = core_settings(asked.model, asked.parallel, asked.training, transformer_engine=False, on_gpu=on_gpu)
        assert settings["masked_softmax_fusion"] is False


@pytest.mark.parametrize(
    ("training", "granularity", "method", "layers", "modules"),
    [
        ({"recompute": "selective", "recompute_modules": ["mlp"]}, "selective", None, None, ["mlp"]),
        ({"recompute": "full"}, "full", "uniform", 1, None),
        ({"recompute": "block", "recompute_layers": 3}, "full", "block", 3, None),
    ],
)
def test_recomputation_reaches_megatron_core(
    training: dict, granularity: str, method: str | None, layers: int | None, modules: list[str] | None
) -> None:
    config = config_on_gpu(training)
    assert (config.recompute_granularity, config.recompute_method) == (granularity, method)
    assert config.recompute_num_layers == layers
    assert modules is None or config.recompute_modules == modules


def test_offloaded_layers_and_parallel_sizes_reach_megatron_core() -> None:
    config = config_on_gpu({"cpu_offload_layers": 3})
    assert (config.cpu_offloading, config.cpu_offloading_num_layers) == (True, 3)
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "context_parallel_size": 2}
    config = config_on_gpu({}, **sizes, virtual_pipeline_parallel_size=2, context_parallel_exchange="all_gather")
    assert config.tensor_model_parallel_size == config.pipeline_model_parallel_size == config.context_parallel_size == 2
    assert (config.virtual_pipeline_model_parallel_size, config.cp_comm_type) == (2, "all_gather")
    assert config.overlap_p2p_comm and not config.batch_p2p_comm
    config = config_on_gpu({}, pipeline_parallel_size=2, first_stage_layers=3)
    assert (config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage) == (3, None)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"fp8": "tensorwise", "dtype": "float32"}, "needs training.dtype=bfloat16"),
        ({"fp8": "delayed", "bf16_layers_at_start": 1}, "not delayed"),
        ({"fp8_param_gather": True}, "training.fp8_param_gather needs training.fp8=delayed, tensorwise or blockwise"),
        ({"fp8": "mxfp8", "fp8_param_gather": True}, "or blockwise, not mxfp8"),
        ({"bf16_layers_at_end": 1}, "not none"),
        ({"fp8": "tensorwise", "sequence_length": 100}, "tokens of a micro-batch=100 is not a multiple of"),
        ({"fp8": "blockwise", "sequence_length": 64}, "tokens of a micro-batch=64 is not a multiple of"),
        ({"fp8": "tensorwise", "bf16_layers_at_start": 9}, "more than the 8 layers"),
        ({"recompute": "selective", "recompute_modules": []}, "recompute_modules is empty"),
        ({"recompute": "block", "recompute_layers": 9}, "more than the layers of a pipeline stage"),
        ({"cpu_offload_layers": 8}, "must be below model.num_layers=8"),
        ({"cpu_offload_layers": 2, "recompute": "full"}, "give one of them"),
    ],
)
def test_what_does_not_go_together_is_refused(training: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        recipe(training).check(1)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("parallel", [{"distributed_optimizer": False}, {"fsdp": "optim_grads_params"}])
def test_parameters_in_fp8_need_the_distributed_optimizer(parallel: dict) -> None:
    with pytest.raises(UserError, match=r"fp8_param_gather needs optimizer\.name=adam and"):
        recipe({"fp8": "delayed", "fp8_param_gather": True}, **parallel).check(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is active")
@pytest.mark.parametrize(
    ("training", "parallel", "words"),
    [
        ({"fp8": "delayed", "fp8_param_gather": True}, {}, "training.fp8=delayed needs Transformer Engine on a GPU"),
        ({"cpu_offload_layers": 1}, {}, "training.cpu_offload_layers needs Transformer Engine"),
        ({}, {"context_parallel_size": 2}, "needs Transformer Engine's attention"),
    ],
)
def test_what_is_not_active_on_a_cpu_is_an_error(training: dict, parallel: dict, words: str) -> None:
    asked = recipe(training, **parallel)
    with pytest.raises(UserError, match=words):
        transformer_config(asked.model, asked.parallel, asked.training)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU does")
def test_the_log_says_what_runs() -> None:
    asked = recipe({})
    config = transformer_config(asked.model, asked.parallel, asked.training)
    assert describe_kernels(config).startswith(
        "CPU: Megatron Core's own kernels, bf16, gradient accumulation not fused"
    )
    assert not fuses_gradient_accumulation()
