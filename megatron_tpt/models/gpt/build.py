"""Llama-, Qwen- and OLMo-2-family models as Megatron Core `GPTModel`s."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from megatron_tpt import platform  # noqa: F401  (adapts Megatron Core)
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.models.gpt.norms import NormedResidual, RMSNorm, over_all_heads
from megatron_tpt.models.gpt.rope import rotary_attention_factor, rotary_frequencies
from megatron_tpt.models.initialization import initialize_weights
from megatron_tpt.models.precision import (
    TORCH_DTYPES,
    fp8_settings,
    fuses_gradient_accumulation,
    recompute_settings,
    require_active,
)
from megatron_tpt.platform.megatron_core import set_rotary_attention_factor

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig


def use_transformer_engine(model: GPTConfig) -> bool:
    """Whether to use Transformer Engine's kernels. Raises UserError when they are requested but not installed."""
    if model.transformer_impl == "local" or (model.transformer_impl == "auto" and not torch.cuda.is_available()):
        return False
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            "Transformer Engine is not installed: install transformer-engine[pytorch], or give "
            "--model.transformer_impl=local to train on the GPU with Megatron Core's slower kernels"
        )
    return True


def transformer_config(model: GPTConfig, parallel: ParallelConfig, training: TrainingConfig) -> TransformerConfig:
    """Megatron Core's configuration of the model, with its layout and precision, for this machine.

    Raises UserError for kernels that are not available on it.
    """
    transformer_engine = use_transformer_engine(model)
    require_active(training, transformer_engine=transformer_engine)
    if parallel.context_parallel_size > 1 and not transformer_engine:
        raise UserError(
            f"parallel.context_parallel_size={parallel.context_parallel_size} needs Transformer Engine's attention, "
            f"which only runs on GPUs: set it to 1 here"
        )
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        **core_settings(model, parallel, training, transformer_engine=transformer_engine, on_gpu=on_gpu),
        gradient_accumulation_fusion=fuses_gradient_accumulation() and parallel.fsdp == "none",
    )


def core_settings(
    model: GPTConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    *,
    transformer_engine: bool,
    on_gpu: bool,
) -> dict[str, Any]:
    """The fields of TransformerConfig, on a machine with or without these kernels."""
    dtype = TORCH_DTYPES[training.dtype]
    vp = parallel.virtual_pipeline_parallel_size
    return dict(
        transformer_impl="transformer_engine" if transformer_engine else "local",
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=model.mlp_bias,  # the attention's are in _block_spec
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        rotary_interleaved=False,
        init_method_std=model.init_std,
        perform_initialization=False,  # initialize_weights does it, alike for every layout
        use_cpu_initialization=not on_gpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.dtype == "bfloat16",
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
        # With several chunks per stage, communication overlaps computation; batched communication cannot overlap.
        overlap_p2p_comm=vp > 1,
        batch_p2p_comm=vp == 1,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.context_parallel_exchange if parallel.context_parallel_size > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        # Gradients are divided by the tokens of the global batch, so that every token has the same weight. The gradient
        # buffers read this when they are created, so it must be set before.
        calculate_per_token_loss=True,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,  # apex's kernel takes any mask for causal: packed examples would see each other
        cross_entropy_loss_fusion=on_gpu and dtype is torch.bfloat16,  # its gradients are bf16, whatever the logits are
        # The fused kernel does not support a factor on the cosines and sines.
        apply_rope_fusion=transformer_engine and rotary_attention_factor(model) == 1.0,
        deallocate_pipeline_outputs=parallel.pipeline_parallel_size > 1,
        **fp8_settings(training),
        **recompute_settings(training),
    )


def _with_biases(layer: ModuleSpec, model: GPTConfig) -> ModuleSpec:
    """The layer with the biases of `model` on the attention's projections: TransformerConfig.add_bias_linear would
    switch them together with those of the feed-forward network."""
    attention = layer.submodules.self_attention.submodules
    attention.linear_qkv = _building(attention.linear_qkv, bias=model.qkv_bias)
    attention.linear_proj = _building(attention.linear_proj, bias=model.attention_output_bias)
    return layer


def _building(build: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """`build` with some arguments fixed, whatever the caller passes for them."""
    return lambda *args, **kwargs: build(*args, **{**kwargs, **fixed})


def _with_norms(layer: ModuleSpec, model: GPTConfig, config: TransformerConfig) -> ModuleSpec:
    """The layer with the norms of OLMo-2, if the model has them: behind attention and feed-forward network in place of
    before them, and over all heads of queries and keys together."""
    parts, attention = layer.submodules, layer.submodules.self_attention.submodules
    if model.norm_placement == "after":
        if config.transformer_impl == "transformer_engine":  # whose projections have the norms before them
            from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

            attention.linear_qkv = TEColumnParallelLinear
            parts.mlp.keywords["submodules"].linear_fc1 = TEColumnParallelLinear
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        parts.self_attn_bda = parts.mlp_bda = ModuleSpec(module=NormedResidual, params={"config": config})
    if model.qk_norm and model.qk_norm_width == "all-heads":
        attention.q_layernorm = over_all_heads(model.num_attention_heads)
        attention.k_layernorm = over_all_heads(model.query_groups)
    return layer


def _block_spec(
    model: GPTConfig, config: TransformerConfig, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    if config.transformer_impl == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_norm)
        return _with_biases(_with_norms(layer, model, config), model)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=model.qk_norm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if model.qk_norm:
        layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    layer = _with_biases(_with_norms(layer, model, config), model)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )


def _set_rotary_scaling(gpt: GPTModel, model: GPTConfig) -> None:
    """Set the rotary frequencies of a new model, and its factor on cosines and sines. Megatron Core only supports Llama
    3's scaling with one original context, and stores YaRN's factor in the attention of every layer."""
    gpt.rotary_pos_emb.inv_freq = rotary_frequencies(model)
    for layer in gpt.decoder.layers:
        set_rotary_attention_factor(layer.self_attention, rotary_attention_factor(model))


def build_model(
    model: GPTConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    *,
    seed: int | None,
    vp_stage: int | None = None,
) -> GPTModel:
    """This rank's part of the model (of its `vp_stage`). Weights are drawn from `seed`, equally for every layout.
    Without a seed they are uninitialized, for loading weights later: drawing billions of them takes minutes.

    Needs initialized process groups (`megatron_tpt.platform`). The model maps token ids [b, s] and labels [b, s] to
    losses [b, s], and without labels to logits [b, s, padded vocabulary / tensor-parallel size].
    """
    return finish_model(construct_model(model, parallel, training, vp_stage), model, training, seed)


def construct_model(
    model: GPTConfig, parallel: ParallelConfig, training: TrainingConfig, vp_stage: int | None = None
) -> GPTModel:
    """The modules of `build_model`, uninitialized, which a family may still change before `finish_model`."""
    config = transformer_config(model, parallel, training)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=_block_spec(model, config, vp_stage),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=training.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
    )
    if model.rope_scaling_factor is not None:
        _set_rotary_scaling(gpt, model)
    return gpt


def finish_model(gpt: GPTModel, model: GPTConfig, training: TrainingConfig, seed: int | None) -> GPTModel:
    """The model with its initial weights, on its device and in the precision of training."""
    if seed is not None:
        initialize_weights(gpt, model, seed)
    if torch.cuda.is_available():
        gpt.cuda(torch.cuda.current_device())
    return gpt.bfloat16() if training.dtype == "bfloat16" else gpt
