"""Processes that a library starts end with ours, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# A process that starts another, which starts a third, as an engine starts its workers; each writes its number.
PROGRAM = """
import multiprocessing, os, pathlib, sys, time
from megatron_tpt.processes import children_end_with_us

def live(folder, method, generations):
    (folder / f"{os.getpid()}").touch()
    if generations:
        multiprocessing.get_context(method).Process(target=live, args=(folder, method, generations - 1)).start()
    time.sleep(1000)

if __name__ == "__main__":
    method, folder = sys.argv[1:]
    with children_end_with_us():
        multiprocessing.get_context(method).Process(target=live, args=(pathlib.Path(folder), method, 1)).start()
    time.sleep(1000)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_and_theirs_end_when_the_first_is_killed(tmp_path: Path, method: str) -> None:
    program, folder = tmp_path / "program.py", tmp_path / "pids"
    program.write_text(PROGRAM)
    folder.mkdir()
    first = subprocess.Popen([sys.executable, str(program), method, str(folder)])
    deadline = time.monotonic() + 60
    while len(pids := [int(path.name) for path in folder.iterdir()]) < 2:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = [psutil.Process(pid) for pid in pids]
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    _, alive = psutil.wait_procs(family, timeout=120)
    for process in alive:
        process.kill()
    assert not alive


def test_the_limit_of_open_files_is_raised_as_far_as_the_user_may() -> None:
    program = (
        "import resource; from megatron_tpt.processes import num_files_left, raise_file_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 300)); raise_file_limit()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE), 200 < num_files_left() < 300)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said == "(300, 300) True\n"
