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


def wrap_model(gpts: list[GPTModel], recipe: Recipe) -> list[DistributedDataParallel]:
    """The pieces of the model with gradient buffers that are reduced over the data-parallel group, in fp32."""
    parallel = recipe.parallel
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    # Only the gradients of the piece that ends the backward pass are waited for: the others go in one bucket.
    return [
        DistributedDataParallel(get_model_config(gpt), config, gpt, disable_bucketing=piece > 0)
        for piece, gpt in enumerate(gpts)
    ]


def build_optimizer(chunks: list[DistributedDataParallel], recipe: Recipe) -> MegatronOptimizer:
    """AdamW over the pieces of a wrapped model; also tells the model's configuration how its gradients are finished.

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
        fp8_recipe=None if recipe.training.fp8 == "none" else recipe.training.fp8,
        params_dtype=TORCH_DTYPES[recipe.training.dtype],
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
    )
    groups = get_standard_config_overrides(core_config)  # no weight decay on biases and norms
    if not settings.decay_embeddings:
        groups[ParamKey(attr="is_embedding_or_output_parameter")] = ParamGroupOverride(wd_mult=0.0)
    optimizer = get_megatron_optimizer(core_config, chunks, config_overrides=groups)
    for config in map(get_model_config, chunks):
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss
        if recipe.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in chunks]
            config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
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
