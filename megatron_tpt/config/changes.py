"""Where a recipe differs from the one of a checkpoint, and what happens to it."""

import dataclasses
from collections.abc import Iterator
from typing import Any, get_type_hints

from megatron_tpt.config.convert import is_section
from megatron_tpt.config.effects import has_effect
from megatron_tpt.config.load import to_dict
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.config.on_change import Effect, effects_of
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.config.renamed import section_of_now
from megatron_tpt.config.training import BatchSizeStage


@dataclasses.dataclass(frozen=True)
class Change:
    """A field with another value than a checkpoint's."""

    section: str
    field: str
    here: Any
    there: Any
    on_resume: Effect
    from_weights: Effect
    """Where the run starts only from the checkpoint's weights."""

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
    """The values in effect of model fields that depend on others, or on rounding."""
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
    yield from _callback_changes(recipe.callbacks, saved.get("callbacks") or {})
    for section in (name for name, hint in get_type_hints(type(recipe)).items() if is_section(hint)):
        cls = type(getattr(recipe, section))
        here = to_dict(getattr(recipe, section))
        there = to_dict(cls()) | section_of_now(cls, saved.get(section) or {})
        meant = (_resolved(here), _resolved(there)) if issubclass(cls, ModelConfig) else (here, there)
        for name in (field.name for field in dataclasses.fields(cls)):
            if name == "batch_size_ramp":
                there[name] = [to_dict(BatchSizeStage(**stage)) for stage in there[name]]
            is_other = here[name] != there[name] and meant[0].get(name, here) != meant[1].get(name, there)
            if is_other and has_effect(recipe, section, name):
                yield Change(section, name, here[name], there[name], *effects_of(cls, name))


def _callback_changes(here: dict[str, Any], there: dict[str, Any]) -> Iterator[Change]:
    for name in {**there, **here}:
        if here.get(name) != there.get(name):
            yield Change("callbacks", name, here.get(name), there.get(name), Effect.WARNED, Effect.FREE)
