"""What another value of a field does on resume, and in a run that starts from `training.init_from`.

The table has an entry for every field of every section. `training/resume.py` acts on it, docs/recipe.md shows it.
"""

import dataclasses
from collections.abc import Iterator
from enum import Enum
from typing import Any, get_type_hints

from megatron_tpt.config.data import DataConfig, DataPhase, DatasetSource, ExampleSet, SftDataConfig
from megatron_tpt.config.effects import has_effect
from megatron_tpt.config.load import to_dict
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.config.optimizer import OptimizerConfig
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.config.run import CheckpointConfig, FaultsConfig, LoggingConfig, ProfilingConfig, RunConfig
from megatron_tpt.config.training import BatchSizeStage, SftTrainingConfig, TrainingConfig


class Effect(Enum):
    """What becomes of a value that is not the checkpoint's: a name, and what it means."""

    FREE = "takes effect", "the new value holds from the first step on; nothing is said"
    WARNED = "warns", "the new value takes effect, with a warning that names it and the checkpoint's"
    NONE = "warns: no effect", "the weights are the checkpoint's: a value that is given is warned of"
    REFUSED = "refused", "the error says the checkpoint's value; model fields are compared by the shapes they make"
    ALLOWED = (
        "allow_change",
        "refused; with `data.allow_change` the run continues at the samples consumed, with a warning",
    )
    CONTENT = (
        "by content",
        "compared by the samples it makes: refused where those read so far would be others, a warning with "
        "`data.allow_change`",
    )
    TOKENIZER = "by content of the tokenizer", "refused where it is another one (`training.allow_other_tokenizer`)"
    LAYOUT = (
        "takes effect, or refused",
        "refused for checkpoints with `checkpoint.optimizer_sharding: dp_reshardable`, takes effect for the others",
    )
    PRECISION = "warns, or refused", "warns; refused without `parallel.distributed_optimizer`"

    @property
    def label(self) -> str:
        """Its name in the documentation."""
        return self.value[0]

    @property
    def meaning(self) -> str:
        """What it means, in words."""
        return self.value[1]


_Entries = dict[tuple[Effect, Effect], str]
_FREE, _WARNED, _NONE, _REFUSED = Effect.FREE, Effect.WARNED, Effect.NONE, Effect.REFUSED
_ALLOWED, _CONTENT = Effect.ALLOWED, Effect.CONTENT

# By section: (on resume, from training.init_from) -> fields. A run that starts from a checkpoint takes its weights and
# nothing else: there only fields of the model can contradict them.
_TABLE: dict[type, _Entries] = {
    RunConfig: {
        (_REFUSED, _FREE): "seed",
        (_FREE, _FREE): "output_dir threads_per_process distributed_timeout_s time_limit_min time_limit_margin_min "
        "first_step_timeout_s hang_timeout_s",
    },
    ModelConfig: {
        (_REFUSED, _REFUSED): "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups head_dim "
        "tie_embeddings qkv_bias attention_output_bias mlp_bias qk_norm",
        # Rows of the embedding are added for tokens that the checkpoint lacks (training.new_token_rows).
        (_REFUSED, _FREE): "vocab_size vocab_padding_multiple",
        (_WARNED, _WARNED): "rotary_base rope_scaling_factor rope_scaling_type rope_original_context "
        "rope_low_freq_factor rope_high_freq_factor rope_beta_fast rope_beta_slow rope_truncate rope_attention_factor "
        "norm_epsilon",
        (_WARNED, _FREE): "hidden_dropout attention_dropout",
        (_NONE, _NONE): "init_std",
        (_FREE, _FREE): "preset max_position_embeddings transformer_impl",
    },
    ParallelConfig: {
        (_REFUSED, _FREE): "distributed_optimizer",
        (Effect.LAYOUT, _FREE): "tensor_parallel_size pipeline_parallel_size virtual_pipeline_parallel_size "
        "first_stage_layers last_stage_layers fsdp overlap_grad_reduce",
        (_FREE, _FREE): "context_parallel_size context_parallel_exchange rank_order sequence_parallel "
        "overlap_param_gather",
    },
    OptimizerConfig: {
        (_REFUSED, _FREE): "name",
        (_WARNED, _FREE): "learning_rate adam_learning_rate min_learning_rate schedule warmup_steps decay_steps "
        "wsd_decay_steps wsd_decay_shape weight_decay decay_embeddings adam_beta1 adam_beta2 adam_epsilon "
        "muon_momentum muon_nesterov muon_newton_schulz_steps muon_coefficients muon_scale muon_scale_factor "
        "muon_split_qkv muon_tensor_parallel muon_matmul_precision clip_grad",
    },
    TrainingConfig: {
        (_ALLOWED, _FREE): "sequence_length global_batch_size batch_size_ramp",
        (Effect.PRECISION, _FREE): "dtype",
        (_WARNED, _FREE): "fp8 fp8_format fp8_amax_history fp8_param_gather bf16_layers_at_start bf16_layers_at_end",
        (_NONE, _FREE): "init_from new_token_rows",
        (_FREE, _FREE): "num_steps skip_steps micro_batch_size recompute recompute_modules recompute_layers "
        "cpu_offload_layers allow_other_tokenizer validation_interval validation_steps manual_gc_interval",
    },
    SftTrainingConfig: {(_FREE, _FREE): "num_epochs"},
    BatchSizeStage: {(_ALLOWED, _FREE): "num_steps global_batch_size sequence_length"},
    CheckpointConfig: {(_FREE, _FREE): "save_interval keep_last keep_every asynchronous optimizer_sharding verify"},
    FaultsConfig: {
        (_FREE, _FREE): "on_nonfinite on_loss_spike loss_spike_factor loss_spike_window max_skips max_rollbacks "
        "desync_interval rerun"
    },
    LoggingConfig: {
        (_FREE, _FREE): "log_interval tensorboard peak_tflops straggler_factor wandb_project",
    },
    ProfilingConfig: {(_FREE, _FREE): "first_step num_steps ranks shapes stacks memory"},
    DataConfig: {
        (_CONTENT, _FREE): "train phases",
        (Effect.TOKENIZER, Effect.TOKENIZER): "tokenizer",
        (_REFUSED, _FREE): "mock",
        (_WARNED, _FREE): "reset_at_documents loss_on",
        (_FREE, _FREE): "validation allow_change cache_dir num_workers",
    },
    DataPhase: {(_CONTENT, _FREE): "train until_tokens"},
    DatasetSource: {(_CONTENT, _FREE): "path weight", (_FREE, _FREE): "name max_epochs"},
    SftDataConfig: {
        (_CONTENT, _FREE): "train prompt_field response_field on_too_long",
        (Effect.TOKENIZER, Effect.TOKENIZER): "tokenizer",
        (_FREE, _FREE): "validation allow_change num_workers",
    },
    ExampleSet: {(_FREE, _FREE): "path name"},
}


def effects_of(cls: type, name: str) -> tuple[Effect, Effect]:
    """What another value of the field `name` of a section does: on resume, and from training.init_from. Raises KeyError
    for a field without an entry."""
    for base in cls.__mro__:
        for effects, names in _TABLE.get(base, {}).items():
            if name in names.split():
                return effects
    raise KeyError(f"{cls.__name__}.{name} has no entry in the table of {__name__}")


@dataclasses.dataclass(frozen=True)
class Change:
    """A field with another value than a checkpoint's."""

    section: str
    field: str
    here: Any
    there: Any
    on_resume: Effect
    from_weights: Effect
    """Where the run starts from the checkpoint's weights alone."""

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.section}.{self.field}"

    @property
    def before(self) -> str:
        """The field with the checkpoint's value, as on the command line."""
        return f"{self.name}={_show(self.there)}"

    def __str__(self) -> str:
        return f"{self.name}={_show(self.here)} ({_show(self.there)} there)"


def _show(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_show(item)}" for key, item in value.items() if item is not None) + "}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _resolved(model: dict[str, Any]) -> dict[str, Any]:
    """What fields of a model mean that leave something to others, or to rounding."""
    heads, multiple = model["num_attention_heads"], model["vocab_padding_multiple"]
    rows = model["vocab_size"] and -(-model["vocab_size"] // multiple) * multiple
    return {
        "num_query_groups": model["num_query_groups"] or heads,
        "head_dim": model["head_dim"] or model["hidden_size"] // heads,
        "vocab_size": rows,
        "vocab_padding_multiple": rows,
    }


def changes(recipe: Recipe, saved: dict[str, Any]) -> Iterator[Change]:
    """Every field of a recipe whose value is not that of a saved recipe, with what that does.

    `saved` is the content of a checkpoint's recipe.yaml; a field that it lacks, as in earlier versions, has its default
    there. Fields of no consequence in this recipe are omitted.
    """
    defaults = to_dict(type(recipe)())
    for section, cls in get_type_hints(type(recipe)).items():
        here, there = to_dict(getattr(recipe, section)), defaults[section] | (saved.get(section) or {})
        meant = (_resolved(here), _resolved(there)) if cls is ModelConfig else (here, there)
        for name in (field.name for field in dataclasses.fields(cls)):
            if name == "batch_size_ramp":
                there[name] = [to_dict(BatchSizeStage(**stage)) for stage in there[name]]
            is_other = here[name] != there[name] and meant[0].get(name, here) != meant[1].get(name, there)
            if is_other and has_effect(recipe, section, name):
                yield Change(section, name, here[name], there[name], *effects_of(cls, name))
