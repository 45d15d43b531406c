"""docs/recipe.md, the reference of all fields of a recipe."""

from pathlib import Path

from megatron_tpt.config.reference import reference


def test_the_page_is_what_the_dataclasses_say_today() -> None:
    page = Path(__file__).parents[2] / "docs/recipe.md"
    assert page.read_text() == reference(), "run: python -m megatron_tpt.config.reference > docs/recipe.md"
    for line in ("| `learning_rate` | `float` |", "| `path` | `path` | required |", "## data (fine-tuning)"):
        assert line in reference()
    assert "|  |\n" not in reference(), "a field without a docstring"
