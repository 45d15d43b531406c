"""Code answers: passed, failed, timed out or crashed; and held where there is a sandbox."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluation_data import SHARED

from megatron_tpt.errors import UserError
from megatron_tpt.grading import Grader, GraderPool, Item, Reading, Rules
from megatron_tpt.grading.sandbox import Sandbox

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0\n"

# Looks for the nonce in what it can read of some processes' files, and prints what it finds.
_SEARCH = """import os, re
text = b''
for root in '%s'.split():
    for name in ('cmdline', 'environ', 'fd/0', 'fd/1', 'fd/2', 'fd/3'):
        try: text += os.read(os.open(f'{root}/{name}', os.O_RDONLY | os.O_NONBLOCK), 1 << 20)
        except OSError: pass
for nonce in set(re.findall(rb'[0-9a-f]{32}', text)):
    for fd in range(3, 64):
        try: os.write(fd, b'passed ' + nonce)
        except OSError: pass
os._exit(0)"""

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@pytest.fixture(
    scope="module", params=[pytest.param(False, marks=needs_bubblewrap), True], ids=["bubblewrap", "unsandboxed"]
)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    yield Sandbox(unsandboxed=request.param)


@pytest.fixture(scope="module")
def bubblewrap() -> Sandbox:
    return Sandbox()


def shorten_limits(sandbox: Sandbox, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program that never ends do so after 2 s. The others keep their limits: the machine may be busy."""
    monkeypatch.setattr(sandbox, "_time_limit_s", 2)
    if "sleep" in program or "fork" in program:  # does not use up its processor time
        monkeypatch.setattr("megatron_tpt.grading.sandbox._WALL_FACTOR", 1)


@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        (ADD, "passed", ""),
        ("import math, json, dataclasses\n" + ADD, "passed", ""),
        (ADD + "if __name__ == '__main__':\n    input()\n", "passed", ""),
        (ADD.replace("+", "-"), "failed", "AssertionError"),
        ("def add(a, b) return", "failed", "SyntaxError"),
        ("x = 1", "failed", "NameError"),
        ("import sys; sys.exit(0)", "failed", "SystemExit"),
        ("import os; os._exit(0)", "failed", "ended before its tests did"),
        ("def add(a, b):\n    import os; os._exit(0)", "failed", "ended before its tests did"),
        ("while True: pass", "time-out", ""),
        ("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(100)", "time-out", ""),
        ("import os; os.kill(os.getpid(), 11)", "crash", "signal 11"),
        ("x = bytearray(2 << 30)", "failed", "MemoryError"),
        ("while True: print('x' * 1_000_000)", "time-out", ""),
    ],
)
def test_a_program_passes_only_when_all_of_its_tests_ran(
    sandbox: Sandbox, program: str, status: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if status == "time-out":
        shorten_limits(sandbox, program, monkeypatch)
    result = sandbox.run(program, TESTS)
    assert (result.status, detail in result.detail) == (status, True), result


@pytest.mark.parametrize(
    "program",
    [
        "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'passed ' + b'0' * 32)\n    except OSError: pass\n"
        "os._exit(0)",
        "import os, sys\nprint('passed', sys.argv, dict(os.environ), flush=True)\nos._exit(0)",
        _SEARCH % "/proc/self",
    ],
)
def test_a_forged_nonce_is_no_pass(sandbox: Sandbox, program: str) -> None:
    assert sandbox.run(program, TESTS).status == "failed"


@needs_bubblewrap
def test_the_nonce_is_in_no_file_of_the_sandbox(bubblewrap: Sandbox) -> None:
    assert bubblewrap.run(_SEARCH % "/proc/1 /proc/2 /proc/3", TESTS).status == "failed"


def test_what_an_answer_prints_is_neither_read_nor_waited_for(sandbox: Sandbox) -> None:
    assert sandbox.run("print('x' * 20_000_000)\n" + ADD, TESTS).status == "passed"


@needs_bubblewrap
@pytest.mark.parametrize(
    "check",
    [
        # files of the host
        "import os; assert not os.path.exists('/etc/passwd')",
        "import os; assert not os.path.exists('/root') and not os.path.exists('/home')",
        "import os; assert sorted(os.listdir('/')) == ['bin', 'dev', 'lib', 'lib64', 'proc', 'tmp', 'usr']",
        "import os; assert set(os.environ) <= {'PATH', 'HOME', 'PWD', 'LC_CTYPE'}, os.environ",
        "import os; assert b'HOSTS_SECRET' not in open('/proc/1/environ', 'rb').read()",
        "import os; assert os.getuid() != 0 or open('/proc/self/uid_map').read().split()[1] != '0'",
        # writing
        *(
            f"try: open({path!r}, 'w').write('a'); raise SystemExit('wrote')\nexcept OSError: pass"
            for path in ("/x", "/usr/x", "/usr/bin/x", "/proc/sys/kernel/hostname")
        ),
        "open('/tmp/x', 'w').write('a')",
        "n = 0\ntry:\n    for i in range(100):\n"
        "        with open(f'/tmp/f{i}', 'wb') as f: f.write(b'a' * 15_000_000)\n"
        "        n += 15\nexcept OSError: pass\nassert n <= 64",
        # the network
        "import socket\ntry: socket.create_connection(('127.0.0.1', 22), 1); raise SystemExit('connected')\n"
        "except OSError: pass",
        "import socket\ntry: socket.gethostbyname('example.com'); raise SystemExit('resolved')\nexcept OSError: pass",
        "import socket; assert [name for _, name in socket.if_nameindex()] == ['lo']",
        # other processes and namespaces
        "import os; assert len([p for p in os.listdir('/proc') if p.isdigit()]) <= 4",
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) != 0",
        "import os; assert os.system('mount -t tmpfs x /tmp 2>/dev/null') != 0",
        "import os, time\nn = 0\ntry:\n    while n < 1000:\n        if os.fork() == 0: time.sleep(100)\n"
        "        n += 1\nexcept OSError: pass\nassert n < 64",
    ],
)
def test_the_host_is_out_of_reach(bubblewrap: Sandbox, monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    monkeypatch.setenv("HOSTS_SECRET", "1")
    result = bubblewrap.run(ADD, TESTS + check + "\n")
    assert result.status == "passed", result


PROGRAMS = SHARED / "probes" / "sandbox_programs"
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


@needs_bubblewrap
@pytest.mark.skipif(not PROGRAMS.is_dir(), reason=f"there is no {PROGRAMS}")
@pytest.mark.parametrize("name", sorted(HELD))
def test_programs_that_try_to_break_out_are_held(
    name: str, bubblewrap: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTS_SECRET", "1")
    status, checks = HELD[name]
    program = (PROGRAMS / name).read_text()
    if status == "time-out":
        shorten_limits(bubblewrap, program, monkeypatch)
    result = bubblewrap.run(program, f"import os\n{checks}\n")
    assert result.status == status, result
    assert not _running()
    assert sorted(path.name for path in PROGRAMS.glob("*.py")) == sorted(HELD)


@needs_bubblewrap
def test_a_fork_bomb_ends_with_its_sandbox(bubblewrap: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    with monkeypatch.context() as patched:
        shorten_limits(bubblewrap, bomb, patched)
        assert bubblewrap.run(bomb, TESTS).status in ("time-out", "crash")
    assert not _running()
    assert bubblewrap.run(ADD, TESTS).status == "passed"


def _running() -> list[Path]:
    """The processes of sandboxes."""
    paths = Path("/proc").glob("[0-9]*/cmdline")
    return [path for path in paths if path.exists() and b"RLIMIT_NOFILE" in _read(path)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_without_a_sandbox_code_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"bwrap is not installed.*--allow-unsandboxed-code"):
        Grader(Rules("code"))


def test_a_sandbox_that_the_system_forbids_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("bwrap", "setpriv"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"No permissions to create new namespace.*--allow-unsandboxed-code"):
        Grader(Rules("code"))


@pytest.mark.parametrize(
    ("output", "prefix", "first", "reason"),
    [
        (f"Here it is:\n```python\n{ADD}```\nDone.", "", False, None),
        (f"```python\nx = 1\n```\nBetter:\n```\n{ADD}```", "", False, None),
        (f"```python\n{ADD}```\n```python\nx = 1\n```", "", False, "failed"),
        (f"```python\nfrom __future__ import annotations\n{ADD}```", "import os\n", False, None),
        ("    return a + b\n", "def add(a, b):\n", False, None),  # a completion
        (ADD + "```\nThis adds.", "", True, None),
        ("I cannot.", "", False, "no answer"),
        (f"```python\n{ADD}", "", False, "no answer"),
        (f"<think>\n```python\n{ADD}```", "", False, "thinking not closed"),
    ],
)
def test_the_last_fenced_block_or_a_completion_is_run(
    output: str, prefix: str, first: bool, reason: str | None
) -> None:
    grader = Grader(Rules("code", Reading(first), allow_unsandboxed_code=True, code_time_limit_s=5))
    grade = grader.grade(Item(output, TESTS.splitlines(), code_prefix=prefix))
    assert (grade.reason, grade.tier) == (reason, None if reason else "tests"), grade


def test_programs_are_run_by_the_pool() -> None:
    rules = Rules("code", allow_unsandboxed_code=True, code_time_limit_s=1)
    programs = [ADD, "while True: pass", ADD.replace("+", "*")]
    with GraderPool(rules, num_workers=2) as pool:
        grades = pool.grade([Item(f"```\n{program}\n```", TESTS) for program in programs])
    assert [grade.reason for grade in grades] == [None, "time-out", "failed"]
