"""Megatron Core's optimizer, schedule and gradient buffers from a recipe."""

import math

from megatron_tpt import platform  # noqa: F401  (adapts Megatron Core)
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.models.gpt import TORCH_DTYPES

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import (
    OptimizerParamScheduler,
    ParamGroupOverride,
    get_canonical_lr_for_logging,
)
from megatron.core.utils import get_model_config


def wrap_model(gpt: GPTModel, recipe: Recipe) -> DistributedDataParallel:
    """The model with gradient buffers that are reduced over the data-parallel group, in fp32."""
    parallel = recipe.parallel
    return DistributedDataParallel(
        get_model_config(gpt),
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            use_distributed_optimizer=parallel.distributed_optimizer,
        ),
        gpt,
    )


def build_optimizer(model: DistributedDataParallel, recipe: Recipe) -> MegatronOptimizer:
    """AdamW over a wrapped model; also tells the model's configuration how its gradients are finished.

    A clip_grad of 0 still measures the gradient norm, it only never clips.
    """
    settings = recipe.optimizer
    core_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_epsilon,
        clip_grad=settings.clip_grad or math.inf,
        bf16=recipe.training.dtype == "bf16",
        params_dtype=TORCH_DTYPES[recipe.training.dtype],
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
    )
    groups = get_standard_config_overrides(core_config)  # no weight decay on biases and norms
    if not settings.decay_embeddings:
        groups[ParamKey(attr="is_embedding_or_output_parameter")] = ParamGroupOverride(wd_mult=0.0)
    optimizer = get_megatron_optimizer(core_config, [model], config_overrides=groups)
    config = get_model_config(model)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if recipe.parallel.overlap_grad_reduce:
        config.no_sync_func = model.no_sync
    return optimizer


def build_schedule(optimizer: MegatronOptimizer, recipe: Recipe) -> OptimizerParamScheduler:
    """Linear warm-up, then the recipe's decay, counted in optimizer steps; update k (from 0) uses the rate at k."""
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


def current_learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate of the next update."""
    rate = get_canonical_lr_for_logging(optimizer.param_groups)
    assert rate is not None
    return float(rate)
