"""The lock of a run folder: one job at a time, and nothing that is left over prevents a resume."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_runs import Train

from megatron_tpt.errors import UserError
from megatron_tpt.training.run_lock import LOCK, Holder, acquire, run_lock

_HOLD = """
import sys, time
from pathlib import Path
from megatron_tpt.training.run_lock import run_lock

with run_lock(Path(sys.argv[1]), touch_interval_s=0.1):
    print("held", flush=True)
    time.sleep(600)
"""
ELSEWHERE = "another-node its-boot pid:[1]"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the lock of `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n", process.stderr
    yield process
    process.kill()
    process.communicate()


def leave(folder: Path, **changes: object) -> Path:
    """A lock of this process but for `changes`, as a run would leave it behind."""
    path = folder / LOCK
    acquire(path, dataclasses.replace(Holder.of_this_process(), **changes))  # type: ignore[arg-type]
    return path


def test_a_second_job_learns_who_has_the_folder_and_since_when(holder: subprocess.Popen, tmp_path: Path) -> None:
    since = json.loads((tmp_path / LOCK).read_text())["since"]
    with (
        pytest.raises(UserError, match=f"in use by process {holder.pid} on .* since {re.escape(since)}"),
        run_lock(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder.pid


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_killed_run_is_resumed_at_once(is_reaped: bool, holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    if is_reaped:
        holder.wait()
    else:  # its parent, a shell say, has not asked for its exit code
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with run_lock(tmp_path, patience_s=3600):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_process_number_used_again_is_not_taken_for_the_run(holder: subprocess.Popen, tmp_path: Path) -> None:
    start = json.loads((tmp_path / LOCK).read_text())["start"]
    (tmp_path / "other").mkdir()
    leave(tmp_path / "other", pid=holder.pid, start=start - 1)
    with run_lock(tmp_path / "other", patience_s=3600):
        pass


@pytest.mark.parametrize("machine", [ELSEWHERE, Holder.of_this_process().machine.replace("pid:[", "pid:[9")])
def test_a_silent_run_elsewhere_is_over_whatever_its_clock_says(machine: str, tmp_path: Path) -> None:
    path = leave(tmp_path, machine=machine)
    os.utime(path, (time.time() + 1e6, time.time() + 1e6))
    with run_lock(tmp_path, patience_s=0.5):
        assert json.loads(path.read_text())["machine"] != machine


@pytest.mark.parametrize("step_s", [-1000, 1])
def test_a_run_elsewhere_that_shows_life_is_not_disturbed(step_s: int, tmp_path: Path) -> None:
    path, is_over = leave(tmp_path, machine=ELSEWHERE, host="another-node"), threading.Event()

    def show_life() -> None:
        clock = time.time()
        while not is_over.wait(0.05):
            clock += step_s  # its clock may be set back
            os.utime(path, (clock, clock))

    thread = threading.Thread(target=show_life)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by process .* on another-node"):
            acquire(path, Holder.of_this_process(), patience_s=60)
    finally:
        is_over.set()
        thread.join()


def test_a_job_that_slurm_has_requeued_takes_over_at_once_and_another_does_not(tmp_path: Path) -> None:
    path = leave(tmp_path, machine=ELSEWHERE, slurm_job="17", slurm_restarts=1)
    again = Holder.of_this_process({"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2"})
    found = Holder(**json.loads(path.read_text()))
    assert found.is_alive(again) is False
    for other in ({"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "18"}, {}):
        assert found.is_alive(Holder.of_this_process(other)) is None
    acquire(path, again, patience_s=3600)
    assert Holder(**json.loads(path.read_text())) == again


def test_a_run_whose_lock_was_taken_over_ends_and_says_by_whom(holder: subprocess.Popen, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = leave(tmp_path / "other")
    os.replace(other, tmp_path / LOCK)
    _, said = holder.communicate(timeout=60)
    assert holder.returncode == 1 and f"was taken over by process {os.getpid()}" in said
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_lock_that_was_deleted_is_written_again(holder: subprocess.Popen, tmp_path: Path) -> None:
    (tmp_path / LOCK).unlink()
    deadline = time.monotonic() + 60
    while not (tmp_path / LOCK).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert holder.poll() is None
    with pytest.raises(UserError, match=f"process {holder.pid}"), run_lock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", '{"host": "node', "[1]", '{"unknown": 1}'])
def test_a_lock_that_says_nothing_is_watched(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    with run_lock(tmp_path, patience_s=0.3):
        pass


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    path = leave(tmp_path, start=1)
    begin, got, refused = threading.Barrier(8), [], []

    def take() -> None:
        own = Holder.of_this_process()
        begin.wait()
        try:
            acquire(path, own)
            got.append(own)
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 7
    assert Holder(**json.loads(path.read_text())) == got[0]
    assert [one.name for one in tmp_path.iterdir()] == [LOCK]


def test_a_folder_in_use_is_left_as_it_is_by_all_ranks(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with run_lock(tmp_path / "run"):
        with pytest.raises(AssertionError, match=f"UserError.*in use by process {os.getpid()}"):
            train("run", num_processes=2)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
