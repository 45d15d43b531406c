"""Kinds of runs, each a class in its own file: the sections of its recipe, and methods for all that is specific to it.

These modules do not import torch: what needs torch or Megatron Core is imported inside methods, so that `--help` and
error messages appear at once. May import every stage, and rl, whose program imports it in turn; else only
the programs and tools import it.
"""

import importlib
import inspect
import pkgutil

from megatron_tpt.recipes.base import TrainingRecipe


def recipe_types() -> list[type[TrainingRecipe]]:
    """The kinds of recipes: the class of every module of this package, by its program's name."""
    found = []
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        members = vars(importlib.import_module(module.name)).values()
        found += [one for one in members if _is_kind(one) and one.__module__ == module.name]
    return sorted(found, key=lambda kind: kind.program)


def _is_kind(member: object) -> bool:
    return isinstance(member, type) and issubclass(member, TrainingRecipe) and not inspect.isabstract(member)
