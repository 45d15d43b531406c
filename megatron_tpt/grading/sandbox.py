"""Run code that a model wrote: in bubblewrap, without network, on a read-only root, within limits.

The sandbox protects the machine. It does not protect the tests from an answer that attacks them in their own process:
code that overrides `__eq__`, or hunts through the interpreter's frames, can pretend to pass.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_tpt.errors import UserError
from megatron_tpt.units import MIB

Status = Literal["passed", "failed", "time-out", "crash"]

_DRIVER = Path(__file__).with_name("sandbox_driver.py").read_text(encoding="utf-8")
_PATH = "/usr/local/bin:/usr/bin:/bin"
_MEMORY = 1024 * MIB
"""Per process: with `_PROCESSES` the most that an answer can take."""
_PROCESSES = 16
_FILE = 16 * MIB
_WALL_FACTOR = 6
"""Real time that a program may take, as a multiple of its processor time: for one that sleeps, or a busy machine."""


@dataclass(frozen=True)
class CodeResult:
    """The result of a program and its tests."""

    status: Status
    """"failed": an exception, or the end of the program before that of the tests; "crash": ended by a signal."""
    detail: str = ""


class Sandbox:
    """Where answers run. Raises UserError when bubblewrap is missing or not permitted here, unless `unsandboxed`."""

    def __init__(self, unsandboxed: bool = False, time_limit_s: float = 10.0) -> None:
        self._unsandboxed = unsandboxed
        self._time_limit_s = time_limit_s
        self._command = [sys.executable] if unsandboxed else _bubblewrap()
        probe = self.run("x = 1", "assert x == 1")
        if probe.status != "passed":
            raise UserError(_refusal(f"a program that should pass ended as {probe.status!r} ({probe.detail})"))

    def run(self, program: str, tests: str) -> CodeResult:
        """Run `program`, then `tests` in the same namespace.

        Tests whose first line is `# program` get it as the text `program` and run it themselves, as for programs that
        read an input.

        The limit is one of processor time; real time may be six times as long, as on a busy machine.
        """
        nonce = secrets.token_hex(16)
        limits = {
            "RLIMIT_CPU": max(1, round(self._time_limit_s)),
            "RLIMIT_AS": _MEMORY,
            "RLIMIT_FSIZE": _FILE,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        }
        if not self._unsandboxed:  # outside, the processes of all programs of the user would count
            limits["RLIMIT_NPROC"] = _PROCESSES
        job = json.dumps({"program": program, "tests": tests, "nonce": nonce, "limits": limits}).encode()
        # The results go to files, whose size is limited, and not to pipes, which would have to be drained.
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                [*self._command, "-I", "-S", "-c", _DRIVER],
                stdin=subprocess.PIPE,  # not a file: /proc/1/fd/0 would give it, and the nonce, to the program
                stdout=out,
                stderr=err,
                env={"PATH": _PATH},
                cwd=folder,
                start_new_session=True,
            )
            timed_out = False
            try:
                process.communicate(job, timeout=_WALL_FACTOR * self._time_limit_s)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                _end(process)
            return _result(process.returncode, timed_out, _tail(out.fileno()), _tail(err.fileno()), nonce)


def _bubblewrap() -> list[str]:
    """The command before Python's arguments. Everything but /usr is missing inside; `/` and `/usr` are read-only."""
    bwrap, python = shutil.which("bwrap"), shutil.which("python3", path="/usr/local/bin:/usr/bin")
    if bwrap is None:
        raise UserError(_refusal("bwrap is not installed (apt-get install bubblewrap)"))
    if python is None:
        raise UserError(_refusal("there is no python3 in /usr/local/bin or /usr/bin: the sandbox sees nothing else"))
    unprivileged: list[str] = []
    if os.geteuid() == 0:  # the limit of processes does not bind root
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise UserError(
                _refusal("setpriv, which lowers root's rights, is not installed (apt-get install util-linux)")
            )
        unprivileged = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    return [
        *unprivileged,
        *(bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"),
        *("--die-with-parent", "--new-session", "--hostname", "sandbox"),
        *("--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"),
        *("--symlink", "usr/bin", "/bin", "--proc", "/proc", "--dev", "/dev"),
        *("--size", str(64 * MIB), "--tmpfs", "/tmp", "--size", str(16 * MIB), "--tmpfs", "/dev/shm"),
        *("--chdir", "/tmp", "--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp"),
        *("--remount-ro", "/", python),
    ]


def _refusal(reason: str) -> str:
    return (
        f"code answers run in a sandbox (bubblewrap), which is not available here: {reason}; install or permit it, or "
        "give --allow-unsandboxed-code to run what the model wrote with your own rights"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and, outside of a sandbox, what it has started (in the sandbox, all of it ends with bwrap)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, 1000, max(0, size - 1000)).decode(errors="replace").strip()


def _result(code: int, timed_out: bool, out: str, err: str, nonce: str) -> CodeResult:
    if timed_out:
        return CodeResult("time-out")
    if out.endswith(f"passed {nonce}"):
        return CodeResult("passed")
    number = -code if code < 0 else code - 128  # bwrap hands a signal on as a shell does
    if number == signal.SIGXCPU:
        return CodeResult("time-out")
    if out.startswith("failed "):
        return CodeResult("failed", out.removeprefix("failed "))
    if 0 < number < signal.NSIG:
        return CodeResult("crash", f"killed by signal {number}")
    if err:
        return CodeResult("crash", err[-300:])
    return CodeResult("failed", f"the program ended before its tests did (code {code})")
