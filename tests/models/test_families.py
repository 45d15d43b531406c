"""A model family is one folder: with it there, a recipe names it, and everything else works."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_tpt import models, platform
from megatron_tpt.config import suggestions
from megatron_tpt.config.load import recipe_from_dict, to_dict
from megatron_tpt.config.model import families
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.reference import help_text
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.interop.hf_config import adapter_of
from megatron_tpt.models.spec import build_chunks
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.reference import recipe_page
from megatron_tpt.training.describe import describe
from megatron_tpt.training.devices import find_device

SHAPE = {"vocab_size": 300, "hidden_size": 32, "ffn_hidden_size": 64}


def forget_families() -> None:
    families.cache_clear()
    suggestions._all_names.cache_clear()


@pytest.fixture(autouse=True)
def with_one_more_family(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """tests/models/families/scaled, as if it were a folder of megatron_tpt/models."""
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(Path(__file__).with_name("families"))])
    forget_families()
    yield
    forget_families()
    sys.modules.pop("megatron_tpt.models.scaled", None)


def recipe(**model: object) -> PretrainRecipe:
    return recipe_from_dict(PretrainRecipe, {"model": {**SHAPE, **model}, "data": {"mock": True}})


def test_a_recipe_names_its_family_and_gives_its_fields() -> None:
    scaled = recipe(family="scaled", embedding_scale=4).model
    assert to_dict(scaled) == to_dict(recipe().model) | {"family": "scaled", "embedding_scale": 4.0}
    assert scaled.num_parameters() == recipe().model.num_parameters()
    assert "parameters                       45,216" in describe(recipe(family="scaled"), 1, find_device("h100"))
    assert "`embedding_scale`" in recipe_page() and "--model.embedding_scale" in help_text(PretrainRecipe, "", "")


@pytest.mark.parametrize(
    ("model", "reported"),
    [
        ({"family": "mamba"}, "model.family=mamba is not known: use one of gpt, scaled"),
        ({"embedding_scale": 2}, "model.embedding_scale: unknown; it is a setting of model.family=scaled"),
        ({"family": "scaled", "embedding_scale": 0}, "model.embedding_scale=0.0 must be above 0"),
        ({"family": "scaled", "embeding_scale": 2}, "model.embeding_scale: unknown; did you mean embedding_scale?"),
    ],
)
def test_mistakes_are_named(model: dict, reported: str) -> None:
    with pytest.raises(UserError) as refusal:
        recipe(**model)
    assert str(refusal.value) == reported


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {vocab_size: 300}\n")  # before there were families: gpt
    raw = {"model": {"family": "scaled"}, "training": {"init_from": str(tmp_path)}}
    with pytest.raises(UserError, match=r"has a model of model\.family=gpt, and this recipe model\.family=scaled"):
        recipe_from_dict(PretrainRecipe, raw)
    assert recipe_from_dict(PretrainRecipe, {"training": raw["training"]}).model.family == "gpt"


@torch.no_grad()
def test_it_is_built_and_cannot_be_exported() -> None:
    parallel, training, tokens = ParallelConfig(), TrainingConfig(dtype="float32"), torch.arange(16)[None]
    losses = []
    with platform.process_groups(parallel):
        platform.seed_everything(0)
        for own in ({}, {"family": "scaled", "embedding_scale": 1}, {"family": "scaled", "embedding_scale": 4}):
            (gpt,) = build_chunks(recipe(**own).model, parallel, training, seed=1)
            losses.append(gpt(tokens, tokens, attention_mask=None, labels=tokens))
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    with pytest.raises(UserError, match=r"model\.family=scaled has no Hugging Face counterpart"):
        adapter_of(recipe(family="scaled").model)


def test_a_finished_run_names_only_commands_that_its_family_can_follow() -> None:
    exported, kept = (recipe(**own).next_steps(1).splitlines() for own in ({}, {"family": "scaled"}))
    assert [line.split(":")[0] for line in exported] == ["finished", "next, to export", "or, to fine-tune"]
    assert [line.split(":")[0] for line in kept] == ["finished", "next, to fine-tune"]
    of_model = recipe(family="scaled").model
    assert FinetuneRecipe(model=of_model).next_steps(1).startswith("finished: ")
    assert "to evaluate" not in FinetuneRecipe(model=of_model).next_steps(1)
