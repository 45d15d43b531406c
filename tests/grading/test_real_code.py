"""Reference solutions pass their tests in the sandbox, and programs that break out of one are held."""

import shutil
from pathlib import Path

import pytest
from evaluation_data import DATA, SHARED, needs_data, rows

from megatron_tpt.evaluation.options import parse_benchmarks
from megatron_tpt.evaluation.problems import read_problems
from megatron_tpt.grading import Grade, GraderPool, Item
from megatron_tpt.grading.sandbox import Sandbox

PROGRAMS = SHARED / "probes" / "sandbox_programs"
needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
pytestmark = [needs_data, needs_bubblewrap]

# What the programs have reached, seen by the tests in the same process.
HELD = {
    "ok.py": (
        "passed",
        "assert os.getuid() != 0 or open('/proc/self/uid_map').read().split()[1] != '0'\n"
        "assert [p for p in ('/x', '/tmp/x', '/usr/x', '/dev/shm/x') if os.path.exists(p)] == ['/tmp/x', '/dev/shm/x']",
    ),
    "evil.py": (
        "passed",
        "reached = {name for name, what in r if what.startswith('OK')}\n"
        "assert dict(r)['mount'] != 'OK 0' and dict(r)['unshare userns'] in ('OK -1', 'OSError', 'PermissionError')\n"
        "assert 'HOSTS_SECRET' not in str(r) and set(os.environ) <= {'PATH', 'HOME', 'PWD', 'LC_CTYPE'}\n"
        "assert not reached & {'read shadow', 'dns', 'chmod /usr'}, r",
    ),
    "disk.py": ("passed", "assert n <= 64"),
    "fork.py": ("passed", "assert n < 64"),
    "loop.py": ("time-out", ""),
    "mem.py": ("failed", ""),
    "out.py": ("time-out", ""),
    "sleep.py": ("time-out", ""),
}


def graded(name: str, outputs: list[str]) -> list[Grade]:
    """The grades of `outputs` to the problems of a benchmark."""
    [run] = parse_benchmarks(["--model", "m", "--output", "o", "--benchmark", name])
    problems = read_problems(run, DATA)
    with GraderPool(run.rules()) as pool:
        return pool.grade(
            Item(output, problem.answer, code_prefix=problem.code_prefix)
            for output, problem in zip(outputs, problems, strict=True)
        )


@pytest.mark.slow
def test_reference_solutions_of_humaneval_pass() -> None:
    solutions = rows("humaneval")
    blocks = [f"Here it is:\n```python\n{row['prompt']}{row['canonical_solution']}```" for row in solutions]
    assert [grade.correct for grade in graded("humaneval", blocks)] == [True] * 164
    completions = [row["canonical_solution"] for row in solutions]
    assert [grade.correct for grade in graded("humaneval-base", completions)] == [True] * 164
    empty = ["    pass\n"] * 164
    assert not any(grade.correct for grade in graded("humaneval-base", empty))


@pytest.mark.slow
def test_reference_solutions_of_mbpp_pass_but_for_one_that_takes_too_long() -> None:
    solutions = rows("mbpp_a")
    found = graded("mbpp", [f"```python\n{row['code']}\n```" for row in solutions])
    failing = {row["task_id"]: grade.reason for row, grade in zip(solutions, found, strict=True) if not grade.correct}
    assert (len(found), failing) in [(360, {}), (360, {123: "time-out"})]  # 123 takes about ten seconds


@pytest.mark.parametrize("name", sorted(HELD))
@pytest.mark.skipif(not PROGRAMS.is_dir(), reason=f"there is no {PROGRAMS}")
def test_programs_that_try_to_break_out_are_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTS_SECRET", "1")
    status, checks = HELD[name]
    result = Sandbox(time_limit_s=2).run((PROGRAMS / name).read_text(), f"import os\n{checks}\n")
    assert result.status == status, result
    assert sorted(path.name for path in PROGRAMS.glob("*.py")) == sorted(HELD)
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if name.encode() in _read(path)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
