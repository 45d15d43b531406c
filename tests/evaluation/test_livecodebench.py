"""LiveCodeBench's rows as problems, whose programs read an input or complete a class."""

import base64
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.livecodebench import ConvertOptions, convert, problem_of, read_cases
from megatron_tpt.evaluation.options import parse_benchmarks
from megatron_tpt.evaluation.problems import read_problems
from megatron_tpt.grading import Grader, Item

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def packed(cases: Any) -> str:
    """As the hidden tests are."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def row(public: list[tuple[str, str]], hidden: list[tuple[str, str]], function: str | None = None) -> dict[str, Any]:
    kind = "stdin" if function is None else "functional"
    shown, secret = ([{"input": a, "output": b, "testtype": kind} for a, b in each] for each in (public, hidden))
    return {
        "question_id": "abc_1",
        "question_content": "Add the two numbers.\n",
        "starter_code": "" if function is None else f"class Solution:\n    def {function}(self, a, b):\n        ",
        "public_test_cases": json.dumps(shown),
        "private_test_cases": packed(secret),
        "metadata": json.dumps({} if function is None else {"func_name": function}),
        "contest_date": "2024-09-01T00:00:00",
    }


SUMS = row([("1 2\n", "3\n")], [("5\n7", "12"), ("0.5 0.25", "0.75\n")])
PAIRS = row([("1\n2", "[1, 2]")], [('"a"\n[1]', '["a", [1]]')], "pair")


@pytest.fixture(scope="module")
def grader() -> Grader:
    return Grader(parse_benchmarks(["--model", "m", "--output", "o", "--benchmark", "livecodebench"])[0].rules())


@needs_bubblewrap
@pytest.mark.parametrize(
    ("program", "reason", "detail"),
    [
        ("import sys\nprint(sum(map(float, sys.stdin.read().split())))", None, ""),
        ("a, b = map(float, open(0).read().split())\nprint(a + b)\nexit()", None, ""),
        ("import sys\na, b = map(float, sys.stdin.buffer.read().split())\nsys.stdout.write(str(a + b))", None, ""),
        ("try:\n    print(sum(map(float, input().split())))\nexcept ValueError: pass", "failed", "test 1 of 3"),
        ("a, b = input().split()\nprint(float(a) + float(b))", "failed", "ValueError"),
        ("print(3)", "failed", "test 1 of 3"),
        ("import os\nos._exit(0)", "failed", "ended before its tests did"),
        ("def main(:", "failed", "SyntaxError"),
    ],
)  # fmt: skip
def test_a_program_is_given_every_input(program: str, reason: str | None, detail: str, grader: Grader) -> None:
    grade = grader.grade(Item(f"So:\n```python\n{program}\n```", problem_of(SUMS)["tests"]))
    assert (grade.correct, grade.reason) == (reason is None, reason)
    assert detail in grade.detail


@needs_bubblewrap
def test_a_test_that_takes_too_long_fails_alone(grader: Grader) -> None:
    slow = problem_of(SUMS)["tests"].replace(", 6, ", ", 0.5, ")
    grade = grader.grade(Item("```python\ntry:\n    while True: pass\nexcept Exception: pass\n```", slow))
    assert (grade.reason, grade.detail[:7]) == ("failed", "TooSlow")


@needs_bubblewrap
@pytest.mark.parametrize(
    ("program", "correct"),
    [
        ("class Solution:\n    def pair(self, a, b):\n        return a, b", True),
        ("class Solution:\n    def pair(self, a: List[int], b) -> List[int]:\n        return [a, b]", True),
        ("def pair(a, b):\n    return [a, b]", True),
        ("class Solution:\n    def pair(self, a, b):\n        return [b, a]", False),
        ("class Solution:\n    def other(self, a, b):\n        return [a, b]", False),
    ],
)
def test_a_function_is_given_the_values_of_every_test(program: str, correct: bool, grader: Grader) -> None:
    assert grader.grade(Item(f"```python\n{program}\n```", problem_of(PAIRS)["tests"])).correct is correct


def test_files_become_problems_of_the_benchmark(tmp_path: Path) -> None:
    (tmp_path / "test4.jsonl").write_text(json.dumps(SUMS) + "\n" + json.dumps(PAIRS | {"question_id": "2"}) + "\n")
    assert convert(ConvertOptions([str(tmp_path / "test4.jsonl")], tmp_path / "livecodebench.jsonl")) == 2
    [run] = parse_benchmarks(["--model", "m", "--output", "o", "--benchmark", "livecodebench"])
    first, second = read_problems(run, tmp_path)
    assert first.id == "abc_1" and first.prompt.startswith("Add the two numbers.\n\nWrite a Python program that reads")
    assert "```python\nclass Solution:\n    def pair(self, a, b):\n```" in second.prompt
    assert run.rules().code_time_limit_s == 120


class _Called:
    def __reduce__(self) -> Any:
        return os.system, ("touch called",)


@pytest.mark.parametrize(
    "change",
    [
        {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(_Called()))).decode()},
        {"private_test_cases": "no base64"},
        {"private_test_cases": packed({"input": "1"})},
        {"metadata": json.dumps({"func_name": "add"})},
        {"public_test_cases": 3},
    ],
)
def test_rows_that_are_none_of_its_are_refused_and_run_nothing(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test4.jsonl").write_text(json.dumps(SUMS) + "\n" + json.dumps(SUMS | change) + "\n")
    with pytest.raises(UserError, match=r"test4.jsonl:2: not a row of LiveCodeBench"):
        convert(ConvertOptions([str(tmp_path / "test4.jsonl")], tmp_path / "out.jsonl"))
    assert not (tmp_path / "called").exists() and not (tmp_path / "out.jsonl").exists()


def test_hidden_tests_are_read_as_they_are_packed() -> None:
    assert read_cases(packed([{"input": "1", "output": "2", "testtype": "stdin"}]))[0]["output"] == "2"
