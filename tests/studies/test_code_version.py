"""Which files a command runs, and which changes of them count."""

from pathlib import Path

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.studies.code_version import code_of


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("def help():\n    import deeper\n    return deeper.X\n")
    (tmp_path / "deeper.py").write_text("X = 1\n")
    (tmp_path / "other.py").write_text("Y = 1\n")
    path = tmp_path / "main.py"
    path.write_text(
        '"""What it does."""\nimport json\nimport helper\nfrom megatron_tpt import units\nRUN = "tools/index.py"\n'
    )
    return path


def test_a_program_is_followed_through_what_it_imports_and_starts(program: Path) -> None:
    found = code_of([str(program), "--x"])
    folder = program.parent
    assert {str(folder / name) for name in ("main.py", "helper.py", "deeper.py")} <= found.keys()
    assert str(folder / "other.py") not in found
    assert {"megatron_tpt/units.py", "megatron_tpt/__init__.py", "megatron_tpt/indexing/writer.py"} <= found.keys()
    assert "megatron_tpt/rl/losses.py" not in found


def test_a_module_of_the_package_is_followed_with_the_families_of_models() -> None:
    found = code_of(["-m", "torch.distributed.run", "-m", "megatron_tpt.pretrain", "recipe.yaml"])
    assert {"megatron_tpt/training/steps.py", "megatron_tpt/models/recurrent/config.py"} <= found.keys()
    assert "megatron_tpt/corpus/prepare.py" not in found and "megatron_tpt/studies/run.py" not in found


def test_what_a_program_reads_beside_itself_counts(program: Path) -> None:
    folder = program.parent
    program.write_text('from pathlib import Path\nHERE = Path(__file__).parent\nR, N = HERE / "r.yaml", "notes.txt"\n')
    for name in ("r.yaml", "notes.txt"):
        (folder / name).write_text("x: 1")
    before = code_of([str(program)])
    assert str(folder / "r.yaml") in before and str(folder / "notes.txt") not in before
    (folder / "r.yaml").write_text("x: 2")
    assert code_of([str(program)]) != before


def test_a_tool_has_the_code_that_it_finds_by_name_and_no_other() -> None:
    """The driver of the sandbox, models that vLLM loads, and benchmarks; indexing builds no model."""
    found = code_of(["tools/evaluate.py"])
    names = ("grading/sandbox_driver.py", "generation/vllm_recurrent.py", "evaluation/benchmarks/gsm8k.yaml")
    assert {f"megatron_tpt/{name}" for name in names} <= found.keys()
    assert not any("/models/" in name or "/training/" in name for name in code_of(["tools/index.py"]))


def test_comments_docstrings_and_formatting_do_not_count(program: Path) -> None:
    def digest() -> str:
        return code_of([str(program)])[str(program)]

    before = digest()
    text = program.read_text()
    program.write_text("# a comment\n" + text.replace("What it does.", "Something else.").replace("\n", "\n\n"))
    assert digest() == before
    program.write_text(text.replace("tools/index.py", "tools/merge_index.py"))
    assert digest() != before


def test_further_files_and_folders_count_where_they_are_named(program: Path) -> None:
    assert str(program.parent / "other.py") in code_of(["-c", ""], [str(program.parent)])
    with pytest.raises(UserError, match=r"no.py: no such file"):
        code_of(["-c", ""], ["no.py"])
    (program.parent / "other.py").write_text("x = (")
    with pytest.raises(UserError, match=r"other.py:1: not Python"):
        code_of(["-c", ""], [str(program.parent)])
