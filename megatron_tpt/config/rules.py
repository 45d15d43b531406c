"""Rules on which settings have an effect, given the others of a recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """Fields that matter only in some recipes."""

    section: str
    fields: tuple[str, ...]
    applies: Callable[[Any], bool]
    """Whether they have an effect in a recipe."""
    needs: str
    """What gives them one."""


def _uses(policy: str) -> Callable[[Any], bool]:
    return lambda recipe: policy in (recipe.faults.on_nonfinite, recipe.faults.on_loss_spike)


SHARED_RULES: tuple[Rule, ...] = (
    Rule(
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
    Rule(
        "optimizer",
        ("wsd_decay_steps", "wsd_decay_shape"),
        lambda recipe: recipe.optimizer.schedule == "wsd",
        "optimizer.schedule=wsd",
    ),
    Rule(
        "optimizer",
        ("min_learning_rate", "decay_steps"),
        lambda recipe: recipe.optimizer.schedule != "constant",
        "an optimizer.schedule that decays",
    ),
    Rule(
        "optimizer", ("decay_embeddings",), lambda recipe: recipe.optimizer.weight_decay > 0, "optimizer.weight_decay"
    ),
    Rule("training", ("fp8_format",), lambda recipe: recipe.training.fp8 != "none", "training.fp8"),
    Rule("training", ("fp8_amax_history",), lambda recipe: recipe.training.fp8 == "delayed", "training.fp8=delayed"),
    Rule(
        "training",
        ("recompute_modules",),
        lambda recipe: recipe.training.recompute == "selective",
        "training.recompute=selective",
    ),
    Rule(
        "training",
        ("recompute_layers",),
        lambda recipe: recipe.training.recompute == "block",
        "training.recompute=block",
    ),
    Rule(
        "training",
        ("allow_other_tokenizer",),
        lambda recipe: recipe.training.init_from is not None,
        "training.init_from",
    ),
    Rule(
        "training",
        ("validation_steps",),
        lambda recipe: recipe.training.validation_interval > 0,
        "training.validation_interval",
    ),
    Rule(
        "parallel",
        ("context_parallel_exchange",),
        lambda recipe: recipe.parallel.context_parallel_size > 1,
        "parallel.context_parallel_size > 1",
    ),
    Rule("checkpoint", ("keep_every",), lambda recipe: recipe.checkpoint.keep_last is not None, "checkpoint.keep_last"),
    Rule(
        "checkpoint",
        ("asynchronous",),
        lambda recipe: 0 < recipe.checkpoint.save_interval < recipe.training.num_steps,
        "a checkpoint.save_interval below training.num_steps",
    ),
    Rule(
        "faults",
        ("loss_spike_factor", "loss_spike_window"),
        lambda recipe: recipe.faults.on_loss_spike != "ignore",
        "faults.on_loss_spike",
    ),
    Rule("faults", ("max_skips",), _uses("skip"), "a policy of skip (faults.on_nonfinite, on_loss_spike)"),
    Rule("faults", ("max_rollbacks",), _uses("rollback"), "a policy of rollback (faults.on_nonfinite, on_loss_spike)"),
    Rule(
        "profiling",
        ("num_steps", "ranks", "shapes", "stacks", "memory"),
        lambda recipe: recipe.profiling.first_step is not None,
        "profiling.first_step",
    ),
)
"""Those of every kind of recipe."""
