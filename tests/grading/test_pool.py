"""Graders run in processes that can be killed; what kills them costs one answer."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.grading import Grade, GraderPool, Item, Reading, Rules

_BOMB = "\\boxed{9^{9^{9^{9}}} + \\sqrt{2}}"


def test_grades_come_in_the_order_of_the_items() -> None:
    items = [Item(f"it is {i}", str(i % 7)) for i in range(300)]
    with GraderPool(Rules("number"), num_workers=2) as pool:
        grades = pool.grade(items)
        assert [grade.correct for grade in grades] == [i == i % 7 for i in range(300)]
        assert [grade.extracted for grade in grades] == [str(i) for i in range(300)]
        assert pool.grade([]) == []


def test_answers_that_hang_are_timed_out_and_the_others_graded() -> None:
    pytest.importorskip("math_verify")
    items = [
        Item("\\boxed{\\sqrt{8}}", "2\\sqrt{2}"),
        Item(_BOMB, "\\sqrt{2}"),
        Item("\\boxed{\\sqrt{18}}", "3\\sqrt{2}"),
    ]
    grades: list[Grade] = []

    def grade() -> None:  # math-verify's own limits do not work in threads
        with GraderPool(Rules("math"), num_workers=1, time_limit_s=1) as pool:
            grades.extend(pool.grade(items))

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert [grade.reason for grade in grades] == [None, "time-out", None]
    assert [grade.tier for grade in grades] == ["math-verify", None, "math-verify"]


def test_a_pattern_that_never_ends_is_timed_out_as_well() -> None:
    rules = Rules("exact", Reading(pattern=r"(a+)+b"))
    with GraderPool(rules, num_workers=1, time_limit_s=1) as pool:
        grades = pool.grade([Item("a" * 60, "x"), Item("ab", "a")])
    assert [(grade.correct, grade.reason) for grade in grades] == [(False, "time-out"), (True, None)]


def test_a_worker_that_dies_is_replaced() -> None:
    with GraderPool(Rules("exact"), num_workers=1) as pool:
        assert pool.grade([Item("a", "a")])[0].correct
        worker = pool._workers[0]
        worker.process.kill()
        worker.process.join()
        assert pool.grade([Item("a", "a")])[0].reason == "crash"
        assert pool.grade([Item("a", "a")])[0].correct


def test_workers_end_with_the_pool(tmp_path: Path) -> None:
    pool = GraderPool(Rules("exact"), num_workers=2)
    pool.grade([Item("a", "a")] * 20)
    pids = [worker.process.pid for worker in pool._workers]
    pool.close()
    assert pids and not any(Path(f"/proc/{pid}").exists() for pid in pids if pid != os.getpid())


def test_limits_of_the_user_hold_in_the_workers(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from megatron_tpt.grading import GraderPool, Item, Rules\n"
        "if __name__ == '__main__':\n"
        "    with GraderPool(Rules('number'), num_workers=1) as pool:\n"
        "        assert pool.grade([Item('it is 4', '4')])[0].correct\n"
    )
    command = ["bash", "-c", f"ulimit -t 500; ulimit -v 3000000; exec {sys.executable} {program}"]
    if os.geteuid() == 0:  # root may raise what others may not
        command = ["setpriv", "--bounding-set=-sys_resource", *command]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unreadable_reference_ends_with_its_message() -> None:
    with GraderPool(Rules("number"), num_workers=1) as pool:
        with pytest.raises(UserError, match="reference answer 'one' cannot be read"):
            pool.grade([Item("1", "1"), Item("1", "one")])
        assert pool.grade([Item("1", "1")])[0].correct
