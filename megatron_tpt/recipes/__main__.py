"""The reference of all recipes: python -m megatron_tpt.recipes > docs/recipe.md"""

from megatron_tpt.config.reference import reference
from megatron_tpt.recipes import recipe_types

if __name__ == "__main__":
    print(reference(recipe_types()), end="")
