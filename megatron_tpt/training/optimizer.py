"""Builds Megatron Core's optimizer, schedule and gradient buffers from a recipe."""

import importlib.util
import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megatron_tpt import platform
from megatron_tpt.config.optimizer import OptimizerConfig
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.errors import UserError
from megatron_tpt.models.precision import TORCH_DTYPES
from megatron_tpt.training.phases import phase

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import ParamKey, ParamPredicate, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.layer_wise_optimizer import (
    LayerWiseDistributedOptimizer,
    is_managed_by_layer_wise_optimizer,
    tag_params_for_buffer_routing,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.optimizer_param_scheduler import (
    OptimizerParamScheduler,
    ParamGroupOverride,
    get_canonical_lr_for_logging,
)
from megatron.core.utils import get_model_config


def _whole_matrices_layout(
    gpt: GPTModel, config: DistributedDataParallelConfig, *, is_first_piece: bool
) -> FullParamLayout:
    """Buffers in which each matrix that Muon updates is entirely on one data-parallel rank, with the buckets that
    DistributedDataParallel would make."""
    num_ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    has_buckets = config.overlap_grad_reduce and is_first_piece and parallel_state.is_pipeline_first_stage()
    tag_params_for_buffer_routing([gpt])
    return LayerWiseDistributedOptimizer.compute_full_param_layout(
        list(gpt.parameters()), max(40_000_000, 1_000_000 * num_ranks) if has_buckets else None, num_ranks, config
    )


def _shard_model(gpt: GPTModel, recipe: Recipe) -> FullyShardedDataParallel:
    parallel = recipe.parallel
    config = DistributedDataParallelConfig(
        use_megatron_fsdp=True,
        use_distributed_optimizer=True,
        data_parallel_sharding_strategy=parallel.fsdp,
        megatron_fsdp_main_params_dtype=torch.float32,
        megatron_fsdp_main_grads_dtype=torch.float32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    with platform.fsdp_construction():
        return FullyShardedDataParallel(get_model_config(gpt), config, gpt, device=platform.device())


def buffer_settings(recipe: Recipe) -> DistributedDataParallelConfig:
    """Megatron Core's settings for the gradient and parameter buffers."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=recipe.parallel.overlap_grad_reduce,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
        fp8_param_gather=recipe.training.fp8_param_gather,
    )


def wrap_model(gpts: list[GPTModel], recipe: Recipe) -> list[DistributedDataParallel | FullyShardedDataParallel]:
    """Wrap the chunks of the model with gradient buffers, which are reduced over the data-parallel group in fp32."""
    parallel = recipe.parallel
    if parallel.fsdp != "none":
        return [_shard_model(gpt, recipe) for gpt in gpts]
    config = buffer_settings(recipe)
    splits_whole_matrices = recipe.optimizer.name == "muon" and parallel.distributed_optimizer
    # Only the chunk that ends the backward pass is waited for, so all others reduce their gradients in one bucket.
    return [
        DistributedDataParallel(
            get_model_config(gpt),
            config,
            gpt,
            disable_bucketing=piece > 0,
            full_param_layout=_whole_matrices_layout(gpt, config, is_first_piece=piece == 0)
            if splits_whole_matrices
            else None,
        )
        for piece, gpt in enumerate(gpts)
    ]


def _muon_settings(settings: OptimizerConfig, *, distributed: bool) -> dict[str, Any]:
    """Fields of Megatron Core's configuration for Muon. Its momentum is a moving average, like Adam's first moment."""
    if importlib.util.find_spec("emerging_optimizers") is None:
        raise UserError("optimizer.name=muon needs the package emerging-optimizers: install it")
    return dict(
        optimizer="muon",
        # Adam's state is sharded as usual; Muon's is sharded by whole matrices.
        use_distributed_optimizer=False,
        use_layer_wise_distributed_optimizer=distributed,
        muon_momentum=settings.muon_momentum,
        muon_nesterov=settings.muon_nesterov,
        muon_num_ns_steps=settings.muon_newton_schulz_steps,
        muon_coefficient_type=settings.muon_coefficients,
        muon_scale_mode=settings.muon_scale,
        muon_extra_scale_factor=settings.muon_scale_factor,
        muon_split_qkv=settings.muon_split_qkv,
        muon_tp_mode=settings.muon_tensor_parallel,
        muon_fp32_matmul_prec=settings.muon_matmul_precision,
    )


def build_optimizer(
    chunks: list[DistributedDataParallel | FullyShardedDataParallel], recipe: Recipe
) -> MegatronOptimizer:
    """The optimizer of a wrapped model; also sets in the model's configuration how its gradients are finalized.

    With a clip_grad of 0 the gradient norm is still measured, but never clipped.
    """
    settings = recipe.optimizer
    kind: dict[str, Any] = {"optimizer": "adam", "use_distributed_optimizer": recipe.parallel.distributed_optimizer}
    if settings.name == "muon":
        kind = _muon_settings(settings, distributed=recipe.parallel.distributed_optimizer)
    core_config = CoreOptimizerConfig(
        lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_epsilon,
        clip_grad=settings.clip_grad or math.inf,
        bf16=recipe.training.dtype == "bfloat16",
        fp8_recipe=None if recipe.training.fp8 == "none" else recipe.training.fp8,
        params_dtype=TORCH_DTYPES[recipe.training.dtype],
        overlap_param_gather=recipe.parallel.overlap_param_gather,
        **kind,
    )
    groups = get_standard_config_overrides(core_config)  # no weight decay on biases and norms
    if not settings.decay_embeddings:
        groups[ParamKey(attr="is_embedding_or_output_parameter")] = ParamGroupOverride(wd_mult=0.0)
    if settings.adam_learning_rate is not None:
        is_adams = ParamPredicate("of_adam", lambda parameter: not is_managed_by_layer_wise_optimizer(parameter))
        groups[ParamKey(predicate=is_adams)] = ParamGroupOverride(
            max_lr=settings.adam_learning_rate,
            min_lr=settings.min_learning_rate * settings.adam_learning_rate / settings.learning_rate,
        )
    optimizer = get_megatron_optimizer(core_config, chunks, config_overrides=groups)
    for config in map(get_model_config, chunks):
        config.finalize_model_grads_func = phase("gradient reduction")(finalize_model_grads)
        # No grad_scale_func: the loss scale of fp32 and bf16 is 1, and a model that knows its optimizer is never freed
        # (Megatron Core's optimizer keeps autograd nodes whose hooks hold the model, a cycle that gc does not see).
        # FSDP reduces gradients after every micro-batch unless the last one is marked.
        if recipe.parallel.overlap_grad_reduce or recipe.parallel.fsdp != "none":
            no_sync = [chunk.no_sync for chunk in chunks]
            config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return optimizer


def build_schedule(optimizer: MegatronOptimizer, recipe: Recipe) -> OptimizerParamScheduler:
    """Linear warm-up, then the recipe's decay, in optimizer steps; update k (from 0) uses the rate of step k."""
    settings = recipe.optimizer
    decay_steps = settings.decay_steps or recipe.training.num_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style={"wsd": "WSD"}.get(settings.schedule, settings.schedule),
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        wsd_decay_steps=settings.wsd_decay_steps or max(1, decay_steps // 10),
        lr_wsd_decay_style=settings.wsd_decay_shape,
    )


def local_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter's gradient after the backward pass: the whole, or under FSDP a shard, which may
    be empty."""
    if isinstance(parameter, DTensor):
        return parameter.grad.to_local() if parameter.grad is not None else torch.zeros(0, device=parameter.device)
    return parameter.main_grad


def current_learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate of the next update."""
    rate = get_canonical_lr_for_logging(optimizer.param_groups)
    assert rate is not None
    return float(rate)
