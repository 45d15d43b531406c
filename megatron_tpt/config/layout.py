"""Whether a model, its batches and its parallel layout fit together, before anything is started."""

from megatron_tpt.config.recipe import Recipe
from megatron_tpt.errors import UserError, require


def _require_multiple(name: str, size: int, divisor_name: str, divisor: int) -> None:
    if size % divisor:
        raise UserError(f"{name}={size} is not a multiple of {divisor_name}={divisor}: change one of them")


def _check_model(recipe: Recipe) -> None:
    model, parallel, training = recipe.model, recipe.parallel, recipe.training
    tp, cp = parallel.tensor_parallel_size, parallel.context_parallel_size
    for name, size in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.query_groups),
        ("ffn_hidden_size", model.ffn_hidden_size),
        ("vocab_padding_multiple", model.vocab_padding_multiple),
    ):
        _require_multiple(f"model.{name}", size, "parallel.tensor_parallel_size", tp)
    if cp > 1:
        name = "twice parallel.context_parallel_size"
        _require_multiple("training.sequence_length", training.sequence_length, name, 2 * cp)
        if model.transformer_impl == "local":
            raise UserError(
                f"parallel.context_parallel_size={cp} needs Transformer Engine's attention: omit "
                f"model.transformer_impl=local, or set the size to 1"
            )
        if parallel.context_parallel_exchange == "a2a":
            name = "parallel.tensor_parallel_size x context_parallel_size"
            _require_multiple("model.num_query_groups", model.query_groups, name, tp * cp)
    if parallel.sequence_parallel:
        name = "parallel.sequence_parallel: tensor_parallel_size x context_parallel_size"
        _require_multiple("training.sequence_length", training.sequence_length, name, tp * cp)


def _check_precision(recipe: Recipe) -> None:
    """FP8 matrices have dimensions of whole blocks; Megatron Core's limits on what stays in bf16 or is offloaded."""
    model, parallel, training = recipe.model, recipe.parallel, recipe.training
    tp = parallel.tensor_parallel_size
    if training.fp8 != "none":
        if model.transformer_impl == "local":
            raise UserError(f"training.fp8={training.fp8} needs Transformer Engine: omit model.transformer_impl")
        block = {"blockwise": 128, "mxfp8": 32}.get(training.fp8, 16)
        name = f"training.fp8={training.fp8}: its block"
        tokens = training.sequence_length * training.micro_batch_size // parallel.context_parallel_size
        _require_multiple("tokens of a micro-batch", tokens, name, block)
        _require_multiple("model.hidden_size", model.hidden_size, name, block)
        _require_multiple("model.ffn_hidden_size / tensor_parallel_size", model.ffn_hidden_size // tp, name, block)
    stage_layers = model.num_layers // parallel.pipeline_parallel_size
    for name in ("bf16_layers_at_start", "bf16_layers_at_end"):
        if getattr(training, name) > stage_layers:
            raise UserError(
                f"training.{name}={getattr(training, name)} is more than the {stage_layers} layers of a pipeline stage"
            )
    if training.cpu_offload_layers >= model.num_layers or (
        training.cpu_offload_layers and parallel.pipeline_parallel_size > 1
    ):
        raise UserError(
            f"training.cpu_offload_layers={training.cpu_offload_layers} must be below model.num_layers="
            f"{model.num_layers}, and 0 with a pipeline: lower it"
        )
    if training.recompute == "block" and training.recompute_layers > max(parallel.stage_layers(model.num_layers)):
        raise UserError(
            f"training.recompute_layers={training.recompute_layers} is more than the layers of a pipeline stage: "
            f"lower it, or give training.recompute=full"
        )


def _check_optimizer(recipe: Recipe) -> None:
    """Megatron Core's limits on schedules, on Muon and on parameters in FP8."""
    decay_steps = recipe.optimizer.decay_steps or recipe.training.num_steps
    if recipe.optimizer.warmup_steps >= decay_steps:
        raise UserError(
            f"optimizer.warmup_steps={recipe.optimizer.warmup_steps} must be below optimizer.decay_steps (or "
            f"training.num_steps)={decay_steps}: lower it, or train longer"
        )
    wsd_decay_steps = recipe.optimizer.wsd_decay_steps or 0
    if recipe.optimizer.schedule == "wsd" and wsd_decay_steps > decay_steps - recipe.optimizer.warmup_steps:
        raise UserError(
            f"optimizer.wsd_decay_steps={wsd_decay_steps} do not fit between the warm-up and the end of the schedule "
            f"({decay_steps - recipe.optimizer.warmup_steps} steps): lower it"
        )
    shards_adam = recipe.optimizer.name == "adam" and recipe.parallel.distributed_optimizer
    need_it = {
        "training.fp8_param_gather": recipe.training.fp8_param_gather,
        "checkpoint.optimizer_sharding=dp_reshardable": recipe.checkpoint.optimizer_sharding == "dp_reshardable",
    }
    for setting in [name for name, is_given in need_it.items() if is_given]:
        require(
            shards_adam and recipe.parallel.fsdp == "none",
            f"{setting} needs optimizer.name=adam and parallel.distributed_optimizer, without parallel.fsdp: change "
            f"them, or omit it",
        )
    if recipe.optimizer.name == "muon" and recipe.parallel.fsdp != "none":
        raise UserError("optimizer.name=muon needs whole matrices: give --parallel.fsdp=none")
    if recipe.optimizer.name == "muon" and recipe.parallel.distributed_optimizer and recipe.training.dtype == "float32":
        raise UserError(
            "optimizer.name=muon in training.dtype=float32 cannot be split over data-parallel processes: give "
            "--parallel.distributed_optimizer=false, or training.dtype=bfloat16"
        )


def check_layout(recipe: Recipe, world_size: int) -> None:
    """Refuse a layout that does not fit the model, the batches or `world_size` processes.

    Raises UserError that says what to change.
    """
    parallel, training = recipe.parallel, recipe.training
    pp, vp = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    _check_model(recipe)
    _check_precision(recipe)
    _check_optimizer(recipe)
    for layers in parallel.stage_layers(recipe.model.num_layers):
        name = "parallel.virtual_pipeline_parallel_size"
        _require_multiple("layers of a pipeline stage", layers, name, vp)
    dp = parallel.data_parallel_size(world_size)
    for batch_size in sorted(training.batch_sizes):
        if batch_size % (training.micro_batch_size * dp):
            raise UserError(
                f"training.global_batch_size={batch_size} is not a multiple of training.micro_batch_size="
                f"{training.micro_batch_size} x {dp} data-parallel processes: change one of them"
            )
        if vp > 1:
            num_microbatches = batch_size // (training.micro_batch_size * dp)
            name = "parallel.pipeline_parallel_size, as virtual_pipeline_parallel_size needs"
            _require_multiple("micro-batches per step and rank", num_microbatches, name, pp)
