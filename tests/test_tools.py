"""The command lines in tools/: documented, and their help readable."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TOOLS = sorted((REPOSITORY / "tools").glob("*.py"))


def _examples(tool: Path) -> list[str]:
    """The commands in the docstring of a tool."""
    lines = (ast.get_docstring(ast.parse(tool.read_text())) or "").splitlines()
    return [line.strip() for line in lines if line.strip().startswith(("python ", "torchrun "))]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_every_tool_is_in_the_readme_and_has_an_example(tool: Path) -> None:
    assert f"tools/{tool.name}" in (REPOSITORY / "README.md").read_text()
    assert _examples(tool)


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if len(_examples(tool)) > 1], ids=lambda tool: tool.name)
def test_help_has_every_example_on_a_line_of_its_own(tool: Path) -> None:
    environment = os.environ | {"COLUMNS": "200"}
    command = [sys.executable, str(tool), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=True).stdout
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for example in _examples(tool):
        assert " ".join(example.split()) in lines
