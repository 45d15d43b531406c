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


# Says of workers whether SIGINT is blocked in them, which only the process that started them can have done.
WORKERS = """
import os, signal
from megatron_tpt.grading import GraderPool, Item, Rules
from megatron_tpt.jobs.ordered_workers import map_in_order
from megatron_tpt.jobs.workers import Workers

def is_blocked(*_):
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())

class Works:
    def __call__(self):
        return is_blocked

def tell(_):
    yield int(is_blocked())

if __name__ == "__main__":
    told = [blocked for _, blocked in map_in_order(Works(), range(4), 2, str)]
    with Workers(2) as workers:
        told += workers.run(tell, range(4))
    with GraderPool(Rules("number"), num_workers=1) as pool:
        pool.grade([Item("1", "1")])
        status = open(f"/proc/{pool._workers[0].process.pid}/status").read()
        mask = int(status.partition("SigBlk:")[2].split()[0], 16)
        told.append(bool(mask >> signal.SIGINT - 1 & 1))
    print(all(told), len(told), is_blocked())
"""


def test_workers_never_get_an_interrupt_not_even_while_they_start(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(WORKERS)
    said = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True).stdout
    assert said == "True 9 False\n"
