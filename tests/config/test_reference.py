"""docs/recipe.md, the reference of all fields of a recipe."""

from pathlib import Path

from megatron_tpt.recipes.reference import recipe_page


def test_the_page_is_what_the_dataclasses_say_today() -> None:
    page = Path(__file__).parents[2] / "docs/recipe.md"
    expected = recipe_page()
    assert page.read_text() == expected, "run: python -m megatron_tpt.recipes.reference > docs/recipe.md"
    for line in ("| `learning_rate` | `float > 0` |", "| `path` | `path` | required |", "## data (fine-tuning)"):
        assert line in expected
    assert "|  |\n" not in expected, "a field without a docstring"
