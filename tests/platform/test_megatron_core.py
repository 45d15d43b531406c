"""What is private in Megatron Core is used in one module, with the one version that has it, and all of it is needed."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_tpt
from megatron_tpt.errors import UserError
from megatron_tpt.platform import megatron_core

from megatron.core import package_info

PACKAGE = Path(megatron_tpt.__file__).parent
ROOT = PACKAGE.parent
CORE = Path(package_info.__file__).parent
CONTACT = PACKAGE / "platform/megatron_core.py"

# Without these a run of two steps on a CPU fails, or its checkpoint (train_without.py).
IN_A_RUN = sorted(name for name in vars(megatron_core) if name.startswith("patch_"))
IN_A_RUN += [
    "before_finalizing",
    "copy_main_weights_to_model",
    "load_without_step",
    "replace_results_queue",
    "set_rotary_attention_factor",
]
# Without these, a test of what they are for.
IN_A_TEST = {
    "indexes_blend": "tests/training/test_blend.py::test_a_phase_ends_at_its_tokens_and_what_was_taken_is_counted",
    "indexes_samples": "tests/training/test_sample_cache.py::test_a_cached_index_is_not_built_again",
    "read_small_index": "tests/training/test_sample_cache.py::test_many_small_datasets_keep_no_file_open",
}
# What calls the others, what only keeps a warning away, and what is tested below.
OTHERS = {"adapt_megatron_to_cpu", "fsdp_construction_on_cpu", "require_version"}


def train_without(name: str, folder: Path) -> subprocess.CompletedProcess:
    program = str(Path(__file__).with_name("train_without.py"))
    return subprocess.run([sys.executable, program, name, str(folder)], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["nothing", "nothing-fsdp"])
def test_with_all_of_it_a_run_trains_saves_and_loads(name: str, tmp_path: Path) -> None:
    result = train_without(name, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_A_RUN)
def test_without_one_of_it_a_run_fails(name: str, tmp_path: Path) -> None:
    assert train_without(name, tmp_path).returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_A_TEST)
def test_without_one_of_it_a_test_fails(name: str) -> None:
    program = (
        f"import sys, pytest; from megatron_tpt.platform import megatron_core; "
        f"megatron_core.{name} = lambda first, *_: first; sys.exit(pytest.main(['-q', '{IN_A_TEST[name]}']))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout + result.stderr


def test_every_function_of_the_module_has_its_test() -> None:
    public = {name for name, value in vars(megatron_core).items() if inspect.isfunction(value) and name[0] != "_"}
    own = {name for name in public if getattr(megatron_core, name).__module__ == megatron_core.__name__}
    assert own == {*IN_A_RUN, *IN_A_TEST, *OTHERS}


def test_the_version_is_the_one_that_is_installed_and_pinned() -> None:
    assert importlib.metadata.version("megatron-core") == megatron_core.VERSION
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pin = f"megatron-core=={megatron_core.VERSION}"
    assert pin in project["dependencies"] and pin in (ROOT / "constraints.txt").read_text().splitlines()
    megatron_core.require_version()


def test_another_version_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_info, "__version__", f"{megatron_core.VERSION}+abcdef0")  # a working tree's commit
    megatron_core.require_version()
    monkeypatch.setattr(package_info, "__version__", "0.20.0rc1")
    reported = rf"0\.20\.0rc1 is installed \(.*\).*: pip install megatron-core=={megatron_core.VERSION}; .*virtual env"
    with pytest.raises(UserError, match=reported):
        megatron_core.require_version()
    monkeypatch.setitem(sys.modules, "megatron.core.package_info", None)
    with pytest.raises(UserError, match="Megatron Core is not installed: pip install"):
        megatron_core.require_version()


@pytest.mark.parametrize("file", megatron_core.RELIES_ON)
def test_the_code_that_is_answered_is_there(file: str) -> None:
    text = (CORE / file).read_text()
    assert [line for line in megatron_core.RELIES_ON[file] if line not in text] == []


def private_names_of_megatron_core() -> set[str]:
    """Functions, methods and classes, attributes and globals whose names begin with one underscore."""
    text = "\n".join(path.read_text() for path in CORE.rglob("*.py"))
    defined = (
        r"^\s*(?:async def|def|class)\s+(_[a-zA-Z]\w*)|\bself\.(_[a-zA-Z]\w*)\s*(?::[^=\n]+)?=[^=]|^(_[a-zA-Z]\w*)\s*="
    )
    return {name for match in re.finditer(defined, text, re.MULTILINE) for name in match.groups() if name}


def private_uses(path: Path) -> Iterator[str]:
    """Names that a module takes from other objects than its own, imports, or has in classes of Megatron's."""
    tree = ast.parse(path.read_text())
    from_megatron = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
            names = {alias.name for alias in node.names}
            from_megatron |= names
            yield from (name for name in names if name.startswith("_"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            yield node.attr
        if isinstance(node, ast.ClassDef) and from_megatron & {ast.unparse(base) for base in node.bases}:
            yield from (item.name for item in node.body if isinstance(item, ast.FunctionDef))
            yield from (item.attr for item in ast.walk(node) if isinstance(item, ast.Attribute))


def test_private_names_are_in_the_one_module_alone() -> None:
    private = private_names_of_megatron_core()
    assert "_yarn_concentration_factor" in private and "_results_queue" in private
    found = {
        path: sorted(private & {name for name in private_uses(path) if not name.startswith("__")})
        for path in PACKAGE.rglob("*.py")
    }
    assert {"_results_queue", "_get_cuda_rng_state"} <= set(found.pop(CONTACT))
    of_transformer_engine = {PACKAGE / "training/desync.py": ["_data"]}  # a name that both have
    assert {path: names for path, names in found.items() if names} == of_transformer_engine


def test_no_line_numbers_of_megatron_core_are_left_to_grow_old() -> None:
    pattern = re.compile(r"\w\.py:\d+")
    assert [path for path in PACKAGE.rglob("*.py") if pattern.search(path.read_text())] == []
