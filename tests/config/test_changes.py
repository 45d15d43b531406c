"""The entries of what each field may do on resume and from init_from: no field is forgotten, none is there twice."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from megatron_tpt.config import changes, on_change
from megatron_tpt.config.load import recipe_from_dict, to_dict
from megatron_tpt.config.model import ModelConfig, section_classes
from megatron_tpt.config.on_change import Effect, effects_of
from megatron_tpt.config.optimizer import OptimizerConfig
from megatron_tpt.config.training import BatchSizeStage, TrainingConfig
from megatron_tpt.recipes import recipe_types
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe


def sections_of(hint: object) -> set[type]:
    """The dataclasses that a type mentions, at any depth."""
    found = {hint} if isinstance(hint, type) and dataclasses.is_dataclass(hint) else set()
    found = {section for one in found for section in section_classes(one)}
    inner = [*get_args(hint), *(hint for one in found for hint in get_type_hints(one).values())]
    return found.union(*map(sections_of, inner))


SECTIONS = sorted(set[type]().union(*map(sections_of, recipe_types())) - {*recipe_types()}, key=str)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_has_its_entry(section: type) -> None:
    for field in dataclasses.fields(section):
        _, from_weights = effects_of(section, field.name)
        assert from_weights in (Effect.FREE, Effect.WARNED, Effect.NONE, Effect.REFUSED, Effect.TOKENIZER)


def test_a_new_field_without_an_entry_is_found() -> None:
    for base in (OptimizerConfig, TrainingConfig, BatchSizeStage):
        section = dataclasses.make_dataclass("Extended", [("new_setting", float, 1.0)], bases=(base,), kw_only=True)
        with pytest.raises(KeyError, match=r"Extended\.new_setting has no entry"):
            [effects_of(section, field.name) for field in dataclasses.fields(section)]


def test_no_entry_is_of_a_field_that_is_gone_or_there_twice() -> None:
    assert set(on_change.TABLE) <= set(SECTIONS) | {TrainingConfig, ModelConfig}
    for section, entries in on_change.TABLE.items():
        names = " ".join(entries.values()).split()
        assert len(names) == len(set(names)), section
        assert set(names) <= {field.name for field in dataclasses.fields(section)}, section


def differences(raw: dict, saved: dict) -> list[str]:
    recipe = recipe_from_dict(PretrainRecipe, {"data": {"mock": True}, **raw})
    return [str(change) for change in changes.changes(recipe, saved)]


def test_values_that_mean_the_same_are_no_change() -> None:
    model = {"num_attention_heads": 4, "hidden_size": 64, "vocab_size": 300}
    mock = {"data": {"mock": True}}
    assert differences({"model": model}, {"model": {**model, "num_query_groups": 4, "head_dim": 16}, **mock}) == []
    assert differences({"model": model}, {"model": {**model, "vocab_size": 320}, **mock}) == []
    assert differences({"model": model}, {"model": {**model, "vocab_size": 385}, **mock}) == [
        "model.vocab_size=300 (385 there)"
    ]
    ramp = {"num_steps": 2, "global_batch_size": 4}  # as a version without `sequence_length` wrote it
    assert (
        differences({"training": {"batch_size_ramp": [ramp]}}, {"training": {"batch_size_ramp": [ramp]}, **mock}) == []
    )


def test_a_field_that_an_older_checkpoint_lacks_had_its_default_there() -> None:
    saved = to_dict(recipe_from_dict(PretrainRecipe, {"data": {"mock": True}}))
    del saved["model"]["norm_epsilon"], saved["optimizer"]
    saved = yaml.safe_load(yaml.safe_dump(saved))
    assert differences({}, saved) == []
    assert differences({"model": {"norm_epsilon": 1e-6}, "optimizer": {"adam_beta2": 0.99}}, saved) == [
        "model.norm_epsilon=1e-06 (1e-05 there)",
        "optimizer.adam_beta2=0.99 (0.95 there)",
    ]


def test_what_has_no_effect_in_this_recipe_is_no_change() -> None:
    saved = {"data": {"mock": True}}
    assert differences({"optimizer": {"muon_momentum": 0.5}, "training": {"fp8_format": "e4m3"}}, saved) == []
    assert differences({"optimizer": {"name": "muon", "muon_momentum": 0.5}}, saved) == [
        "optimizer.name=muon (adam there)",
        "optimizer.muon_momentum=0.5 (0.95 there)",
    ]


def test_the_page_shows_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs/recipe.md").read_text()
    rows = {line.split("`")[1]: line.split(" | ")[-2:] for line in page.splitlines() if line.startswith("| `")}
    assert rows["rotary_base"] == ["warns", "warns |"]
    assert rows["learning_rate"] == ["warns", "takes effect |"]
    assert rows["global_batch_size"] == ["allow_change", "takes effect |"]
    for effect in Effect:
        assert f"- **{effect.label}**: " in page


def test_a_checkpoint_with_names_of_before_is_compared_under_those_of_now() -> None:
    recipe = recipe_from_dict(
        FinetuneRecipe, {"data": {"train": "a.jsonl", "prompt_column": "q"}, "training": {"dtype": "float32"}}
    )
    saved = {"data": {"train": ["a.jsonl"], "prompt_field": "q"}, "training": {"dtype": "fp32"}}
    assert list(changes.changes(recipe, saved)) == []
    assert recipe_from_dict(FinetuneRecipe, saved) == recipe
    others = {"data": {"train": ["a.jsonl"], "prompt_field": "p"}, "training": {"dtype": "bf16"}}
    reported = [str(change) for change in changes.changes(recipe, others)]
    assert reported == ["training.dtype=float32 (bfloat16 there)", "data.prompt_column=q (p there)"]
