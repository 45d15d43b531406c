"""The command lines: documented, their help readable, and there after an installation under their console names."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_tpt.config.cli import console_name

REPOSITORY = Path(__file__).resolve().parents[1]
TOOLS = sorted((REPOSITORY / "megatron_tpt/tools").glob("[a-z]*.py"))
TRAINING = {"pretrain": "pretrain", "finetune": "finetune", "rl": "rl.__main__"}
SCRIPTS = [
    path
    for path in sorted([*REPOSITORY.glob("examples/**/*.py"), *REPOSITORY.glob("benchmarks/**/*.py")])
    if f"python {path.relative_to(REPOSITORY)}" in path.read_text()
]
# Loads every console script of the installation and asks it for help, as in a process of its own.
HELP_OF_ALL = """
import importlib.metadata, sys
import megatron_tpt
print("PACKAGE", megatron_tpt.__file__)
for script in importlib.metadata.distribution("megatron-tpt").entry_points.select(group="console_scripts"):
    sys.argv = [f"bin/{script.name}", "--help"]
    print("SCRIPT", script.name)
    try:
        script.load()()
    except SystemExit as end:
        assert not end.code, script.name
    else:
        raise AssertionError(f"{script.name} came back")
"""


def _examples(tool: Path) -> list[str]:
    """The commands in the docstring of a tool."""
    lines = (ast.get_docstring(ast.parse(tool.read_text())) or "").splitlines()
    return [line.strip() for line in lines if line.strip().startswith(("python ", "torchrun "))]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_every_tool_is_in_the_readme_and_has_an_example(tool: Path) -> None:
    assert f"tools/{tool.name}" in (REPOSITORY / "README.md").read_text()
    assert _examples(tool)


def test_every_tool_is_a_file_in_tools_and_a_console_script() -> None:
    modules = {tool.stem: f"megatron_tpt.tools.{tool.stem}" for tool in TOOLS}
    modules |= {name: f"megatron_tpt.{module}" for name, module in TRAINING.items()}
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {console_name(name): f"{module}:command" for name, module in modules.items()}
    assert {path.name for path in (REPOSITORY / "tools").glob("*.py")} == {tool.name for tool in TOOLS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_example_and_benchmark_that_says_how_it_is_run_is_a_program(script: Path) -> None:
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_the_tested_versions_are_allowed_by_every_extra() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    tested = {
        canonicalize_name(name): version for name, equals, version in (line.partition("==") for line in lines) if equals
    }
    extras = {"": project["dependencies"]} | project["optional-dependencies"]
    named = {extra: [Requirement(line) for line in requirements] for extra, requirements in extras.items()}
    assert {"transformer-engine", "vllm"} <= {requirement.name for requirement in named["gpu"]}
    for extra, requirements in named.items():
        for requirement in requirements:
            version = tested[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{extra}: {requirement} and {version}"


@pytest.mark.parametrize("name", [tool.stem for tool in TOOLS])
@pytest.mark.parametrize("is_installed", [False, True], ids=["checkout", "installed"])
def test_help_has_every_example_on_a_line_of_its_own_as_the_tool_was_called(
    name: str, is_installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = f"bin/{console_name(name)}" if is_installed else f"tools/{name}.py"
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"megatron_tpt.tools.{name}").command()
    assert end.value.code == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for example in _examples(REPOSITORY / "megatron_tpt/tools" / f"{name}.py"):
        own = re.sub(r"python tools/(\w+)\.py", lambda found: console_name(found[1]), example)
        assert " ".join((own if is_installed else example).split()) in lines


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a wheel of this package alone was installed: its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("installation")
    source = folder / "source"
    shutil.copytree(REPOSITORY / "megatron_tpt", source / "megatron_tpt", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    where = ["--prefix", folder / "prefix", "--ignore-installed", "--no-compile"]
    subprocess.run([*pip, "--no-build-isolation", *where, source], check=True)
    return folder / "prefix"


def _run(installation: Path, *command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    [packages] = installation.glob("lib/*/site-packages")
    environment = os.environ | {"PYTHONPATH": str(packages)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


def test_every_console_script_of_the_wheel_answers_help(installation: Path, tmp_path: Path) -> None:
    done = _run(installation, sys.executable, "-c", HELP_OF_ALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"PACKAGE {installation}" in done.stdout
    names = [line.removeprefix("SCRIPT ") for line in done.stdout.splitlines() if line.startswith("SCRIPT ")]
    assert sorted(names) == sorted(path.name for path in (installation / "bin").iterdir())
    assert len(names) == len(TOOLS) + len(TRAINING)


def test_an_installed_wheel_works_without_the_checkout(installation: Path, tmp_path: Path) -> None:
    rows = [{"text": f"The ferry leaves at {i}."} for i in range(50)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = {name: installation / "bin" / name for name in ("tpt-train-tokenizer", "tpt-index")}
    documents = ["--input", "documents.jsonl"]
    train = [script["tpt-train-tokenizer"], *documents, "--vocab-size", "300", "--output", "tokenizer"]
    index = [script["tpt-index"], *documents, "--tokenizer", "tokenizer", "--output", "data/train"]
    for command in (train, index):
        done = _run(installation, *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (tmp_path / "tokenizer/tokenizer.json").rename(tmp_path / "tokenizer/tokenizer.model")
    mistake = _run(installation, *index, cwd=tmp_path)
    assert mistake.returncode == 2
    assert "convert it: tpt-convert-tokenizer --input" in mistake.stderr and "tools/" not in mistake.stderr
