"""Every training recipe in examples/, whole, and small enough to hold in memory."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.rl import RLRecipe

EXAMPLES = Path(__file__).parents[2] / "examples"
# teacher.yaml and the like are recipes too; study.yaml describes a study.
PATHS = sorted(path for path in EXAMPLES.rglob("*.yaml") if "training" in (yaml.safe_load(path.read_text()) or {}))
NAMES = [str(path.relative_to(EXAMPLES).with_suffix("")) for path in PATHS]


def model_of(name: str) -> dict[str, Any]:
    """The section `model` of a recipe."""
    model: dict[str, Any] = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["model"]
    return model


SMOLLM2: dict[str, Any] = {"num_layers": 30, "hidden_size": 576, "ffn_hidden_size": 1536, "num_attention_heads": 9}
SMOLLM2 |= {"num_query_groups": 3, "tie_embeddings": True, "vocab_size": 49152}
RECURRENT = {"family": "recurrent", "tie_embeddings": False}
"""Models that a run starts from, which its recipe does not describe."""
STARTS = {
    "smollm2/midtrain": SMOLLM2,
    "smollm2/finetune": SMOLLM2,
    "recurrence/smollm2_heal": SMOLLM2 | RECURRENT | {"num_layers": 26, "prelude_layers": 10, "coda_layers": 6},
    "recurrence_demo/heal": model_of("recurrence_demo/parent") | RECURRENT | {"num_layers": 3},
}


def load(name: str) -> Recipe:
    """A recipe with a vocabulary, where the data would bring it, and with the model that its start would bring: that of
    the policy, in reinforcement learning."""
    path = EXAMPLES / f"{name}.yaml"
    raw: dict[str, Any] = yaml.safe_load(path.read_text())
    kind = RLRecipe if "rollouts" in raw else PretrainRecipe
    if path.stem.startswith(("finetune", "sft")):
        kind = FinetuneRecipe
    if "model" not in raw:
        raw["model"] = STARTS.get(name) or model_of(str(Path(name).with_name("pretrain")))
    raw["data"] = {"train": "data"}
    for of_data in ("init_from", "validation_interval", "validation_steps"):
        raw["training"].pop(of_data, None)
    recipe = recipe_from_dict(kind, raw)
    if recipe.model.vocab_size is None:
        recipe.model = dataclasses.replace(recipe.model, vocab_size=1000)
    return recipe


def small(model: GPTConfig) -> GPTConfig:
    """The same kind of model with two layers of small sizes: its biases, norms, ties, groups and rotary scaling."""
    groups = 2 if model.query_groups < model.num_attention_heads else None
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 384}
    return dataclasses.replace(model, **sizes, num_query_groups=groups, head_dim=16)
