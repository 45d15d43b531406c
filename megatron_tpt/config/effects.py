"""Settings that were given and have no effect given the others: they are reported, so that none is ignored silently.

A setting counts as given when it differs from its default.
"""

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from megatron_tpt.config.recipe import Recipe


def is_default(section: Any, name: str) -> bool:
    """Whether a field of a section has the value that it has when it is not given."""
    (field,) = [field for field in fields(section) if field.name == name]
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return getattr(section, name) == default


def has_effect(recipe: Recipe, section: str, name: str) -> bool:
    """Whether a field can have an effect in this recipe, given the others."""
    return all(rule.applies(recipe) for rule in recipe.rules if rule.section == section and name in rule.fields)


def without_effect(recipe: Recipe) -> Iterator[str]:
    """A line for every setting that is given and has no effect in this recipe."""
    for rule in recipe.rules:
        section = getattr(recipe, rule.section)
        for name in rule.fields:
            if not is_default(section, name) and not rule.applies(recipe):
                yield f"{rule.section}.{name}={getattr(section, name)} has no effect: it needs {rule.needs}"
    yield from recipe.beyond_the_end()
