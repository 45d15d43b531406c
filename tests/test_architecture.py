"""docs/architecture.md: every file and function that it names exists, and its layers are those that are enforced."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_tpt"
PAGE = (ROOT / "docs/architecture.md").read_text()
NAMED = sorted(set(re.findall(r"\b((?:\w+/)*\w+\.py)\b(?::([\w.]+))?", PAGE)) - {("path/file.py", "name")})
CONTRACT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]


@cache
def definitions(file: Path) -> frozenset[str]:
    """The functions, classes and methods of a file: {"main", "Trainer", "Trainer.fit"}."""
    found = set[str]()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(file.read_text()), "")
    return frozenset(found)


@pytest.mark.parametrize(("path", "name"), NAMED, ids=lambda text: text or "file")
def test_every_file_and_function_that_is_named_exists(path: str, name: str) -> None:
    file = PACKAGE / path
    assert file.is_file() and (not name or name in definitions(file))


def test_the_page_is_one_page_and_names_the_places() -> None:
    assert len(PAGE.splitlines()) <= 120
    assert len(NAMED) > 40
    for named in ("indexing/marks.py:mark_thinking", "checkpoint_files.py:point_latest", "grader.py:Grader.grade"):
        assert named in PAGE


def test_the_picture_has_the_layers_that_are_enforced() -> None:
    boxes = re.findall(r'^  \w+\["([^"]*)"\]$', PAGE.partition("flowchart TD")[2].partition("```")[0], re.MULTILINE)
    shown = [set(re.findall(r"\w+", box.partition(":")[0])) for box in boxes]
    enforced = [set(re.findall(r"\w+", layer)) for layer in CONTRACT["layers"]]
    assert shown[:-1] == enforced[:-1]
    assert shown[-1] - {"and", "other", "single", "modules"} <= enforced[-1]


@pytest.mark.parametrize("package", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_a_package_says_what_it_is_and_what_it_may_import(package: Path) -> None:
    text = ast.get_docstring(ast.parse(package.read_text())) or ""
    assert len(text.splitlines()) >= 4 and re.search(r"[Mm]ay\s+import\s", text)


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]
