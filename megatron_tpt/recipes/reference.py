"""Generates the reference of all recipes: python -m megatron_tpt.recipes.reference > docs/recipe.md"""

from megatron_tpt.config.reference import reference
from megatron_tpt.logs import print_result
from megatron_tpt.recipes import recipe_types


def recipe_page() -> str:
    """docs/recipe.md: all sections of all kinds of recipes, and the built-in callbacks."""
    from megatron_tpt.training.recipe_callbacks import describe_callbacks

    return f"{reference(recipe_types())}\n{describe_callbacks()}"


if __name__ == "__main__":
    print_result(recipe_page(), end="")
