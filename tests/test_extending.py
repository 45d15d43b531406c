"""The examples of docs/extending.md: put into a copy of the package and run, or part of a tested file.

A comment before a block says which: `new: PATH` is a file of the copy or of its folder, `run` is run there, as are the
lines of a `console` block; `from: PATH` is part of a file of this repository. A `diff` is applied to the copy.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/extending.md").read_text()
BLOCK = re.compile(
    r"(?:<!-- (?P<kind>new|from|run):? ?(?P<path>\S*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.S | re.M
)
SECTIONS = {text.partition("\n")[0]: text for text in PAGE.split("\n## ")[1:]}
RUN = [title for title, text in SECTIONS.items() if "<!-- run -->" in text]


def blocks(text: str) -> list[re.Match[str]]:
    return list(BLOCK.finditer(text))


def test_every_block_of_code_is_tested() -> None:
    assert len(RUN) == 5
    untested = [
        block["text"] for block in blocks(PAGE) if block["language"] not in ("diff", "console") and not block["kind"]
    ]
    assert not untested


def test_what_is_shown_of_a_file_is_that_file() -> None:
    shown = [block for block in blocks(PAGE) if block["kind"] == "from"]
    assert len(shown) == 4
    assert not [block["path"] for block in shown if block["text"] not in (ROOT / block["path"]).read_text()]


@pytest.mark.parametrize("title", RUN)
def test_an_example_works_in_a_copy_of_the_package(title: str, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron_tpt", tmp_path / "megatron_tpt", ignore=ignored)

    def run(*command: str, given: str | None = None) -> None:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, input=given, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"

    for block in blocks(SECTIONS[title]):
        if block["language"] == "diff":
            run("git", "apply", "-", given=block["text"])
        elif block["language"] == "console":
            for line in block["text"].splitlines():
                run(sys.executable, *shlex.split(line.removeprefix("$ python ")))
        elif block["kind"] == "new":
            (tmp_path / block["path"]).write_text(block["text"])
        elif block["kind"] == "run":
            run(sys.executable, "-c", block["text"])
