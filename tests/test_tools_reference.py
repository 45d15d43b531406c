"""docs/tools.md, the reference of all options of the tools."""

from pathlib import Path

import megatron_tpt
from megatron_tpt.tools.__main__ import options_class, reference, tools


def test_the_page_is_what_the_tools_take_today() -> None:
    page = Path(megatron_tpt.__file__).parents[1] / "docs/tools.md"
    assert page.read_text() == reference(), "run: python -m megatron_tpt.tools > docs/tools.md"
    for line in (
        "| `PREFIX` | `path` | required |",
        "| `--num-workers` | `int >= 1` |  |",
        "| `--top-p` | `0 < float <= 1` | `0.9` |",
        "| `--dtype` | `float32 \\| bfloat16` |",
        "| `--filters.min-words` | `int >= 0` |",
    ):
        assert line in reference()
    assert "|  |\n" not in reference(), "an option without a docstring"


def test_every_tool_has_options_but_the_one_that_takes_a_recipe_of_training() -> None:
    assert [name for name, tool in tools().items() if options_class(tool) is None] == ["build_cache"]
