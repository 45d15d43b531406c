"""What runs under a keeper ends with it, with its parent, and with the command itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PARENT = """
import os, subprocess, sys
keeper = subprocess.Popen([sys.executable, "-m", "megatron_tpt.generation.keeper", str(os.getpid()), *sys.argv[1:]])
print(keeper.pid, flush=True)
sys.exit(keeper.wait())
"""
# A server whose child does not die with it, as vLLM's engine process.
SERVER = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
path = pathlib.Path(sys.argv[1])
path.with_suffix(".tmp").write_text(f"{os.getpid()} {child.pid}")
path.with_suffix(".tmp").rename(path)
time.sleep(1000)
"""


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, "a process outlived its keeper"
        time.sleep(0.05)


@pytest.mark.parametrize("victim,number", [("parent", 9), ("server", 9), ("keeper", 15)])
def test_nothing_outlives(tmp_path: Path, victim: str, number: int) -> None:
    report = tmp_path / "pids"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, sys.executable, "-c", SERVER, str(report)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    keeper = int(parent.stdout.readline())
    while not report.exists():
        assert parent.poll() is None
        time.sleep(0.05)
    server, child = map(int, report.read_text().split())
    os.kill({"parent": parent.pid, "keeper": keeper, "server": server}[victim], number)
    wait_until_gone([keeper, server, child])
    assert parent.wait() == {"parent": -signal.SIGKILL, "server": 128 + 9, "keeper": 143}[victim]


def test_the_exit_code_is_handed_on() -> None:
    command = [sys.executable, "-m", "megatron_tpt.generation.keeper", str(os.getpid()), "sh", "-c", "exit 7"]
    assert subprocess.run(command, check=False).returncode == 7
