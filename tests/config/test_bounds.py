"""No number is taken that cannot be meant, whichever field of a recipe it is for; nor a small file of large content."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.config.model import section_classes
from megatron_tpt.errors import UserError
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe

# Where 0 is a quantity, or turns something off.
ZERO_IS_MEANT = {
    *("run.seed", "run.time_limit_min", "run.time_limit_margin_min", "run.hang_timeout_s"),
    *("model.norm_epsilon", "model.init_std", "model.hidden_dropout", "model.attention_dropout"),
    *("optimizer.min_learning_rate", "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.adam_beta1"),
    *("optimizer.adam_beta2", "optimizer.adam_epsilon", "optimizer.muon_momentum", "optimizer.clip_grad"),
    *("training.bf16_layers_at_start", "training.bf16_layers_at_end", "training.cpu_offload_layers"),
    *("training.validation_interval", "training.manual_gc_interval", "checkpoint.save_interval"),
    *("faults.max_skips", "faults.max_rollbacks", "faults.desync_interval", "data.num_workers", "profiling.ranks"),
}


def numbers(cls: type, place: tuple[str, ...] = ()) -> Iterator[tuple[str, bool]]:
    """The dotted name of every field that takes numbers, and whether it takes a list of them."""
    for name, hint in get_type_hints(cls).items():
        own, is_list = (*place, name), get_origin(hint) is list
        if dataclasses.is_dataclass(hint):
            for section in section_classes(hint):
                yield from numbers(section, own)
        elif {int, float} & {hint, *get_args(hint)}:
            yield ".".join(own), is_list


FIELDS = [(cls, *found) for cls in (PretrainRecipe, FinetuneRecipe) for found in numbers(cls)]


def take(cls: Any, name: str, value: Any) -> None:
    section, field = name.split(".")
    recipe_from_dict(cls, {section: {field: value}})


@pytest.mark.parametrize(("cls", "name", "is_list"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_numbers_that_cannot_be_meant_are_refused(cls: type, name: str, is_list: bool) -> None:
    wrong = [-1, math.inf, -math.inf, math.nan, *([] if name in ZERO_IS_MEANT else [0])]
    for value in wrong:
        with pytest.raises(UserError, match=name.split(".")[1]) as refusal:
            take(cls, name, [value] if is_list else value)
        assert "\n" not in str(refusal.value)
    if name in ZERO_IS_MEANT:
        take(cls, name, [0] if is_list else 0)


def test_there_are_as_many_fields_as_recipes_have() -> None:
    assert len(FIELDS) > 120 and {name for _, name, _ in FIELDS} > ZERO_IS_MEANT


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"training": {"num_steps": 1e30}}, "training.num_steps: 1e.30 is not a whole number: it is too large"),
        ({"run": {"seed": 2**32}}, "run.seed=4294967296 must be from 0 to 4294967295"),
        ({"data": {"train": [{"path": "a", "weight": math.inf}]}}, "weight: inf is not a number: it is not finite"),
        ({"data": {"phases": [{"train": "a", "until_tokens": -1}]}}, "until_tokens=-1 must be above 0"),
        ({"training": {"batch_size_ramp": [{"num_steps": -1, "global_batch_size": 1}]}}, "num_steps=-1 must be 1"),
        ({"optimizer": {"adam_beta2": 1}}, r"optimizer.adam_beta2=1 must lie in \[0, 1\)"),
    ],
)
def test_a_number_out_of_range_is_reported(recipe: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipe_from_dict(PretrainRecipe, recipe)


def test_sections_without_content_have_the_defaults() -> None:
    names = (
        "run",
        "model",
        "parallel",
        "optimizer",
        "training",
        "checkpoint",
        "faults",
        "logging",
        "profiling",
        "data",
    )
    assert recipe_from_dict(PretrainRecipe, dict.fromkeys(names)) == PretrainRecipe()


def test_a_trace_of_a_rank_that_is_not_there_is_refused() -> None:
    recipe = recipe_from_dict(PretrainRecipe, {"data": {"train": "a"}, "profiling": {"ranks": [0, 4], "first_step": 1}})
    with pytest.raises(UserError, match="there is no rank 4 among 4 processes"):
        recipe.check(4)
    recipe.check(8)
