import importlib.util
import os
import signal
import sys

import pytest
from toy_runs import Toy, all_parts, wait_until_gone

from megatron_tpt.errors import UserError
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.jobs.run import run_tasks

# Each start of Ray takes two cores several seconds.
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs the extra: pip install ".[ray]"')


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path)


@needs_ray
@pytest.mark.slow
def test_on_ray_a_task_that_fails_or_is_killed_stops_no_other_and_runs_again(toy):
    arguments = ["--fault", "kill", "--fault-task", 1, "--meet", 2]
    exit_code, printed = toy.run(*arguments, executor="ray", num_tasks=4, num_workers=2)
    assert exit_code == 1, printed
    assert "task 1 failed with exit code 137 (SIGKILL)" in printed
    assert toy.parts() == [name for name in all_parts(4) if "00001" not in name]
    assert toy.most_at_once() <= 2
    toy.fix()
    exit_code, printed = toy.run(*arguments, executor="ray", num_tasks=4)
    assert exit_code == 0, printed
    assert sorted(toy.starts()) == [0, 1, 1, 2, 3]


@needs_ray
@pytest.mark.slow
def test_on_ray_a_mistake_of_the_user_starts_no_further_tasks(toy):
    arguments = ["--fault", "user_error", "--fault-task", 0]
    exit_code, printed = toy.run(*arguments, executor="ray", num_tasks=3, num_workers=1)
    assert exit_code == 2
    assert printed.splitlines()[-1] == "error: task 0: the shelf has no name: give it one"
    assert toy.starts() == [0]


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_on_ray_no_task_outlives_the_program(toy, signum):
    program = toy.start("--fault", "hang", "--fault-task", 0, executor="ray", num_tasks=1)
    toy.wait_for_starts(1)
    program.send_signal(signum)
    toy.finish(program)
    assert program.returncode != 0
    wait_until_gone(note["pid"] for note in toy.notes())


def test_without_ray_the_command_that_installs_it_is_reported(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'pip install "megatron-tpt\[ray\]"'):
        run_tasks(toy.command(), ScaleOptions(executor="ray"), toy.output / "logs")
    assert not os.listdir(toy.output / "logs")
