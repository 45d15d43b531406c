import errno
import fcntl
import os
import subprocess
import sys

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.jobs.lock import TaskLocked, task_lock

_HOLDER = """
import sys, time
from megatron_tpt.jobs.lock import task_lock
with task_lock(sys.argv[1], 3):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_learns_who_holds_the_task(tmp_path, holder):
    with pytest.raises(TaskLocked, match=f"task 3 is being run already by process {holder.pid} on .*: wait for it"):
        task_lock(tmp_path, 3, timeout_s=0).__enter__()
    with task_lock(tmp_path, 4):
        pass


def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    holder.kill()
    with task_lock(tmp_path, 3, timeout_s=10):
        pass


def test_the_lock_is_free_after_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError), task_lock(tmp_path, 0):
        _ = 1 // 0
    with task_lock(tmp_path, 0):
        pass


def test_a_child_that_outlives_its_parent_does_not_keep_the_lock(tmp_path):
    with task_lock(tmp_path, 0):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    with task_lock(tmp_path, 0, timeout_s=0):
        child.kill()
        child.wait()


def test_a_file_system_without_locks_is_refused_unless_they_are_turned_off(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)  # as Lustre does without its mount option
    with pytest.raises(UserError, match="file system without locks"):
        task_lock(tmp_path, 0).__enter__()
    monkeypatch.setenv("MEGATRON_TPT_NO_LOCKS", "1")
    with task_lock(tmp_path, 0):
        pass


def test_a_link_in_the_place_of_a_lock_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".task_00000.lock").symlink_to(victim)
    with pytest.raises(UserError, match="a link in the place of a file"):
        task_lock(tmp_path, 0, timeout_s=0).__enter__()
    assert victim.read_text() == "precious"


def test_a_lock_file_of_a_process_whose_number_is_taken_again_holds_nothing(tmp_path):
    """What a dead holder wrote names a process and a time: neither decides."""
    (tmp_path / ".task_00000.lock").write_text(f"process {os.getpid()} on here since 2999-01-01T00:00:00+00:00\n")
    with task_lock(tmp_path, 0, timeout_s=0):
        pass


def test_a_clock_that_jumps_neither_shortens_nor_prolongs_waiting_for_a_lock(tmp_path, holder, monkeypatch):
    jumps = iter([0.0, 1e9, -1e9])
    monkeypatch.setattr("time.time", lambda: next(jumps, 1e12))
    with pytest.raises(TaskLocked, match=f"process {holder.pid}"):
        task_lock(tmp_path, 3, timeout_s=0.5).__enter__()
    holder.kill()
    with task_lock(tmp_path, 3, timeout_s=60):
        pass
