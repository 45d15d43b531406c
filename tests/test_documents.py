"""Links, anchors, commands, outputs and messages in Markdown files are those of the repository."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from test_messages import OF_OTHER_PROGRAMS, OF_TRAINING, OPTION, is_option, options_of_recipe, options_of_tools

from megatron_tpt.evaluation import benchmark
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.rl import RLRecipe

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "docs", "benchmarks", "examples", "examples/*", "examples/*/*")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
# They say by which command they are written.
GENERATED = {"docs/recipe.md", "docs/tools.md"}
# What else begins a line of a command; the commands of these are not ours.
PROGRAMS = {
    "make",
    "source",
    "hf",
    "docker",
    "apptainer",
    "enroot",
    "pip",
    "sbatch",
    "torchrun",
    "python",
    ".ci/packages.sh",
}


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def _anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def _blocks(page: Path, language: str) -> list[str]:
    return [block.replace("\\\n", " ") for found, block in FENCE.findall(page.read_text()) if found == language]


def _commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in the `bash` fences of a page, without what stands before the program."""
    for line in "".join(_blocks(page, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words and words[0] not in ("#!/bin/bash", "exec"):
            yield words


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{_name(page)}: {target}"
        if anchor:
            assert anchor in _anchors(file), f"{_name(page)}: {target}: {sorted(_anchors(file))}"


def test_every_page_of_docs_is_reached_from_the_readme() -> None:
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall((ROOT / "README.md").read_text())}
    assert not [_name(page) for page in sorted((ROOT / "docs").glob("*.md")) if page not in linked]


def test_the_readme_counts_the_benchmarks() -> None:
    suites = [name for name in benchmark.names() if len(benchmark.files_of(name)) > 1]
    assert f"| {len(benchmark.names()) - len(suites)} benchmarks," in (ROOT / "README.md").read_text()


def test_the_readme_is_short_and_says_what_has_run_where_on_its_first_screen() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:24])
    assert all(f"**{word}" in first for word in ("For", "Not for", "Status", "To try it", "Teacher"))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=_name)
def test_a_page_begins_with_what_the_reader_can_do_after_it(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert lines[0].startswith("# ") and not lines[1]
    assert _name(page) in GENERATED or lines[2].startswith("After this page you ")


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_names_existing_tools_and_options(page: Path) -> None:
    recipe = {
        name.replace("_", "-")
        for kind in (PretrainRecipe, FinetuneRecipe, RLRecipe)
        for name in options_of_recipe(kind)
    }
    recipe |= OF_TRAINING | OF_OTHER_PROGRAMS
    for words in _commands(page):
        command = " ".join(words)
        program = Path(words[0]).name if words[0].startswith(".venv/bin/") else words[0]
        is_tool = f"tools/{program.removeprefix('tpt-').replace('-', '_')}.py" in TOOLS
        assert program in PROGRAMS or is_tool or os.access(ROOT / program, os.X_OK), command
        if program == "python" and words[1].endswith(".py"):
            assert words[1] in TOOLS or (ROOT / words[1]).is_file() or f"# {words[1]}" in page.read_text(), command
        for target in re.findall(r"^make ([\w-]+)", command):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        tool = re.search(r"tools/(\w+)\.py", command)
        if tool is None and "megatron_tpt." not in command and "slurm/train.sbatch" not in command:
            continue
        ours = re.split(r"slurm/\w+\.sbatch", command)[-1]  # without those of sbatch
        known = options_of_tools().get(tool[1], recipe) | {"--recipe"} if tool else recipe
        assert not [name for name in OPTION.findall(ours) if not is_option(name, known)], command


TOOLS = {f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")}


def test_the_commands_of_the_pages_are_found() -> None:
    commands = [words for page in PAGES for words in _commands(page)]
    assert len(commands) > 60
    assert {word for words in commands for word in words} >= TOOLS - {"tools/analyze_thinking.py"}


def _dry_runs() -> list[tuple[str, str]]:
    """Every dry run of a page that is followed by what it prints."""
    shown = re.compile(
        r"^```bash\n(python [^\n]*--dry-run=[^\n]*)\n```\n\n```text\n(.*?)^```", re.DOTALL | re.MULTILINE
    )
    return [found for page in PAGES for found in shown.findall(page.read_text())]


@pytest.mark.parametrize(("command", "output"), _dry_runs(), ids=lambda text: text.partition("\n")[0][:80])
def test_a_dry_run_prints_what_its_page_shows(command: str, output: str) -> None:
    program = [sys.executable, *shlex.split(command)[1:]]
    printed = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not [line for line in output.splitlines() if line not in printed]


@cache
def _literals() -> str:
    """All texts of the package, a line each, with "..." for what is filled in."""
    texts = list[str]()
    for path in (ROOT / "megatron_tpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    texts.append((ROOT / "tools/setup.sh").read_text())
    return "\n".join(" ".join(text.split()) for text in texts)


def test_every_message_that_troubleshooting_explains_exists() -> None:
    messages = [" ".join(block.split()) for block in _blocks(ROOT / "docs/troubleshooting.md", "text")]
    assert len(messages) > 30
    parts = [part.strip() for message in messages for part in message.split("...")]
    assert not [part for part in parts if len(part) > 3 and part not in _literals()]
