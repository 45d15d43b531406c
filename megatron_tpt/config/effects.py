"""Settings that were given and have no effect beside the others: they are told, so that none is ignored silently.

A setting counts as given when it differs from its default.
"""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

from megatron_tpt.config.recipe import FinetuneRecipe, PretrainRecipe, Recipe


@dataclass(frozen=True)
class _Rule:
    """Fields that matter only in some recipes."""

    section: str
    fields: tuple[str, ...]
    applies: Callable[[Any], bool]
    """Whether they have an effect in a recipe."""
    needs: str
    """What gives them one."""


def _uses(policy: str) -> Callable[[Any], bool]:
    return lambda recipe: policy in (recipe.faults.on_nonfinite, recipe.faults.on_loss_spike)


_RULES = (
    _Rule(
        "optimizer",
        (
            "muon_momentum",
            "muon_nesterov",
            "muon_newton_schulz_steps",
            "muon_coefficients",
            "muon_scale",
            "muon_scale_factor",
            "muon_split_qkv",
            "muon_tensor_parallel",
            "muon_matmul_precision",
        ),
        lambda recipe: recipe.optimizer.name == "muon",
        "optimizer.name=muon",
    ),
    _Rule(
        "optimizer",
        ("wsd_decay_steps", "wsd_decay_shape"),
        lambda recipe: recipe.optimizer.schedule == "wsd",
        "optimizer.schedule=wsd",
    ),
    _Rule(
        "optimizer",
        ("min_learning_rate", "decay_steps"),
        lambda recipe: recipe.optimizer.schedule != "constant",
        "an optimizer.schedule that decays",
    ),
    _Rule(
        "optimizer", ("decay_embeddings",), lambda recipe: recipe.optimizer.weight_decay > 0, "optimizer.weight_decay"
    ),
    _Rule("training", ("fp8_format",), lambda recipe: recipe.training.fp8 != "none", "training.fp8"),
    _Rule("training", ("fp8_amax_history",), lambda recipe: recipe.training.fp8 == "delayed", "training.fp8=delayed"),
    _Rule(
        "training",
        ("recompute_modules",),
        lambda recipe: recipe.training.recompute == "selective",
        "training.recompute=selective",
    ),
    _Rule(
        "training",
        ("recompute_layers",),
        lambda recipe: recipe.training.recompute == "block",
        "training.recompute=block",
    ),
    _Rule(
        "training",
        ("allow_other_tokenizer",),
        lambda recipe: recipe.training.init_from is not None,
        "training.init_from",
    ),
    _Rule(
        "training",
        ("validation_steps",),
        lambda recipe: recipe.training.validation_interval > 0,
        "training.validation_interval",
    ),
    _Rule(
        "parallel",
        ("context_parallel_exchange",),
        lambda recipe: recipe.parallel.context_parallel_size > 1,
        "parallel.context_parallel_size > 1",
    ),
    _Rule(
        "checkpoint", ("keep_every",), lambda recipe: recipe.checkpoint.keep_last is not None, "checkpoint.keep_last"
    ),
    _Rule(
        "checkpoint",
        ("asynchronous",),
        lambda recipe: 0 < recipe.checkpoint.save_interval < recipe.training.num_steps,
        "a checkpoint.save_interval below training.num_steps",
    ),
    _Rule(
        "faults",
        ("loss_spike_factor", "loss_spike_window"),
        lambda recipe: recipe.faults.on_loss_spike != "ignore",
        "faults.on_loss_spike",
    ),
    _Rule("faults", ("max_skips",), _uses("skip"), "a policy of skip (faults.on_nonfinite, on_loss_spike)"),
    _Rule("faults", ("max_rollbacks",), _uses("rollback"), "a policy of rollback (faults.on_nonfinite, on_loss_spike)"),
    _Rule(
        "profiling",
        ("num_steps", "ranks", "shapes", "stacks", "memory"),
        lambda recipe: recipe.profiling.first_step is not None,
        "profiling.first_step",
    ),
)
_PRETRAIN_RULES = (
    _Rule(
        "data",
        ("reset_at_documents", "loss_on", "tokenizer", "cache_dir"),
        lambda recipe: not recipe.data.mock,
        "data of its own, without data.mock",
    ),
)
_PACKED_RULE = _Rule(
    "data",
    ("prompt_field", "response_field", "on_too_long"),
    lambda recipe: False,
    "files of examples: what is packed was read and cut to length by tools/pack_sft.py",
)


def is_default(section: Any, name: str) -> bool:
    """Whether a field of a section has the value that it has when it is not given."""
    (field,) = [field for field in fields(section) if field.name == name]
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return getattr(section, name) == default


def _rules_of(recipe: Recipe) -> list[_Rule]:
    return [*_RULES, *(_PRETRAIN_RULES if isinstance(recipe, PretrainRecipe) else ())]


def has_effect(recipe: Recipe, section: str, name: str) -> bool:
    """Whether a field can have an effect in this recipe, given the others."""
    return all(rule.applies(recipe) for rule in _rules_of(recipe) if rule.section == section and name in rule.fields)


def without_effect(recipe: Recipe, *, all_packed: bool = False) -> Iterator[str]:
    """A line for every setting that is given and has no effect in this recipe. `all_packed`: whether all that a
    fine-tuning run reads is packed."""
    rules = _rules_of(recipe)
    if isinstance(recipe, FinetuneRecipe) and all_packed:
        rules.append(_PACKED_RULE)
    for rule in rules:
        section = getattr(recipe, rule.section)
        for name in rule.fields:
            if not is_default(section, name) and not rule.applies(recipe):
                yield f"{rule.section}.{name}={getattr(section, name)} has no effect: it needs {rule.needs}"
    yield from _beyond_the_end(recipe)


def _beyond_the_end(recipe: Recipe) -> Iterator[str]:
    """What is asked for at steps that the run does not have."""
    training, first = recipe.training, recipe.profiling.first_step
    last = f"the run ends after training.num_steps={training.num_steps}"
    if first is not None and first > training.num_steps:
        yield f"profiling.first_step={first} has no effect: {last}"
    for item in training.skip_steps:
        if int(str(item).partition("-")[0]) > training.num_steps:
            yield f"training.skip_steps: {item} has no effect: {last}"
    if sum(stage.num_steps for stage in training.batch_size_ramp) >= training.num_steps:
        yield f"training.global_batch_size={training.global_batch_size} is never reached by batch_size_ramp: {last}"
    if isinstance(recipe, PretrainRecipe):
        num_samples = training.num_samples(training.num_steps)
        for place, phase in enumerate(recipe.data.phases[:-1], start=1):
            if (phase.end_sample(training.sequence_length) or 0) >= num_samples:
                yield f"data.phases: the phases from number {place + 1} on are never reached: {last}"
                break
