import os
import signal
import subprocess
import sys

import pytest
from toy_runs import Toy, all_parts, runs, wait_until, wait_until_gone

from megatron_tpt.errors import UserError
from megatron_tpt.jobs.local_tasks import ended, worker_environments
from megatron_tpt.jobs.lock import task_lock
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.jobs.report import TaskReport
from megatron_tpt.jobs.run import run_tasks
from megatron_tpt.jobs.task import LOCKED_EXIT_CODE


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path)


def test_all_tasks_run_once_with_no_more_at_once_than_workers(toy):
    report = run_tasks(toy.command("--meet", 2), ScaleOptions(num_tasks=5, num_workers=2), toy.output / "logs")
    assert toy.parts() == all_parts(5)
    assert (toy.output / "part-00003.txt").read_text() == "part 3 of 5\n"
    assert sorted(toy.starts()) == [0, 1, 2, 3, 4]
    assert toy.most_at_once() == 2
    assert [(each.task, each.state, each.exit_code) for each in report.results] == [
        (task, "finished", 0) for task in range(5)
    ]
    assert report.exit_code == 0


def test_each_worker_has_gpus_of_its_own(toy, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-c,3,4")
    options = ScaleOptions(num_tasks=4, gpus_per_task=2)
    run_tasks(toy.command("--meet", 2), options, toy.output / "logs")
    assert {note["gpus"] for note in toy.notes()} == {"0,1", "GPU-c,3"}
    shares = [note["gpus"] for note in toy.notes()[:2]]
    assert len(set(shares)) == 2, "two tasks at once shared GPUs"


def test_more_gpus_than_there_are_is_refused(toy, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="need more than the 1 GPUs that this machine shows"):
        run_tasks(toy.command(), ScaleOptions(gpus_per_task=2), toy.output / "logs")


@pytest.mark.parametrize(
    ("fault", "code", "words"), [("fail", 1, "the shelf is empty"), ("kill", 137, "(SIGKILL)")], ids=["fail", "kill"]
)
def test_a_task_that_fails_or_is_killed_stops_no_other_and_the_same_command_runs_it_alone(toy, fault, code, words):
    arguments = ["--fault", fault, "--fault-task", 1]
    exit_code, printed = toy.run(*arguments, num_tasks=4)
    assert exit_code == 1
    assert toy.parts() == ["part-00000.txt", "part-00002.txt", "part-00003.txt"]
    assert "4 tasks: 3 finished, 1 failed" in printed
    assert f"task 1 failed with exit code {code}" in printed and words in printed
    assert str(toy.output / "logs" / "task_00001.log") in printed
    toy.fix()
    exit_code, printed = toy.run(*arguments, num_tasks=4)
    assert exit_code == 0, printed
    assert toy.starts() == [0, 1, 2, 3, 1]
    assert toy.parts() == all_parts(4)


def test_a_mistake_of_the_user_starts_no_further_tasks_and_is_the_error_of_the_program(toy):
    exit_code, printed = toy.run("--fault", "user_error", "--fault-task", 1, num_tasks=4)
    assert exit_code == 2
    assert toy.starts() == [0, 1]
    assert printed.splitlines()[-1] == "error: task 1: the shelf has no name: give it one"
    assert "1 finished, 1 failed, 2 not run" in printed


def test_a_command_that_does_not_exist_is_a_mistake_of_the_user(toy):
    with pytest.raises(UserError, match="task 0: cannot run no-such-program"):
        run_tasks(["no-such-program"], ScaleOptions(num_tasks=3), toy.output / "logs")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_task_outlives_the_program_and_the_next_run_completes(toy, signum):
    program = toy.start("--fault", "hang", "--fault-task", 1, num_tasks=3, num_workers=2)
    toy.wait_for_starts(3)  # 0 has finished, 1 hangs, 2 has started
    hanging = next(note["pid"] for note in toy.notes() if note["task"] == 1)
    assert runs(hanging)
    program.send_signal(signum)
    toy.finish(program)
    assert program.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[signum]
    wait_until_gone(note["pid"] for note in toy.notes())
    toy.fix()
    exit_code, printed = toy.run(num_tasks=3)
    assert exit_code == 0, printed
    assert toy.parts() == all_parts(3)


def test_a_second_signal_ends_a_task_that_ignores_the_first(toy):
    program = toy.start("--fault", "ignore_sigterm", "--fault-task", 0, num_tasks=1)
    wait_until(lambda: "deaf" in _log(toy))
    program.send_signal(signal.SIGINT)
    with pytest.raises(AssertionError):
        wait_until(lambda: program.poll() is not None, timeout_s=1)
    program.send_signal(signal.SIGINT)
    toy.finish(program)
    assert program.returncode == 130
    wait_until_gone(note["pid"] for note in toy.notes())


def test_what_a_killed_task_left_running_is_ended(toy):
    toy.run("--fault", "leave_child", "--fault-task", 0, num_tasks=1)
    child = int((toy.output / "child").read_text())
    wait_until_gone([child])


def test_two_programs_at_once_run_no_task_twice(toy):
    programs = [toy.start("--seconds", 0.3, num_tasks=3) for _ in range(2)]
    for program in programs:
        printed = toy.finish(program)
        assert program.returncode == 0, printed
    assert sorted(toy.starts()) == [0, 1, 2]


def test_a_task_that_another_process_runs_is_not_run_and_not_called_finished(toy):
    logs = toy.output / "logs"
    program = (
        "import sys, pathlib; from megatron_tpt.jobs.task import run_task;"
        f"run_task({toy.command()!r}, 0, pathlib.Path({str(logs)!r}), lock_timeout_s=0.3)"
    )
    with task_lock(logs, 0):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert f"TaskLocked: task 0 is being run already by process {os.getpid()} on" in done.stderr
    assert toy.starts() == []
    assert ended(0, LOCKED_EXIT_CODE, logs).state == "not run"
    assert TaskReport([ended(0, LOCKED_EXIT_CODE, logs)]).exit_code == 1


def test_cores_per_task_reach_the_libraries_that_count_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert worker_environments(ScaleOptions(cpus_per_task=3)) == [{"OMP_NUM_THREADS": "3"}]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert worker_environments(ScaleOptions(cpus_per_task=3)) == [{}]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_tasks": 0}, "--num-tasks 0: must be 1 or more"),
        ({"num_workers": 0}, "--num-workers 0: must be 1 or more"),
        ({"sbatch_args": ["--exclusive"]}, "name=value without dashes"),
    ],
)
def test_impossible_options_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        ScaleOptions(**wrong)


def test_a_report_of_no_failures_is_a_success():
    assert TaskReport([]).exit_code == 0


def _log(toy):
    path = toy.output / "logs" / "task_00000.log"
    return path.read_text() if os.path.exists(path) else ""
