"""Running the toy job, and what it left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

TOY_JOB = Path(__file__).with_name("toy_job.py")


@dataclass(frozen=True)
class Toy:
    """The toy job with its output in one folder."""

    output: Path

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, str(TOY_JOB), "--output", str(self.output), *map(str, arguments)]

    def start(self, *arguments: object, **scale: object) -> "subprocess.Popen[str]":
        """Run all tasks, in a process of its own."""
        line = self.command(*arguments, "--scale", json.dumps(scale))
        environment = os.environ | {"PYTHONFAULTHANDLER": "1"}  # SIGABRT says where it hangs
        return subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)

    def finish(self, process: "subprocess.Popen[str]") -> str:
        """What a process printed, at its end."""
        try:
            return process.communicate(timeout=300)[1]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            raise AssertionError(f"still running after 300 s:\n{process.communicate(timeout=30)[1]}") from None

    def run(self, *arguments: object, **scale: object) -> tuple[int, str]:
        """Run all tasks to the end; returns the exit code and what was printed."""
        process = self.start(*arguments, **scale)
        printed = self.finish(process)
        return process.returncode, printed

    def fix(self) -> None:
        (self.output / "fixed").touch()

    def parts(self) -> list[str]:
        return sorted(path.name for path in self.output.glob("part-*.txt"))

    def notes(self) -> list[dict]:
        path = self.output / "runs.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def starts(self) -> list[int]:
        """The tasks in the order in which they started, each time that they did."""
        return [note["task"] for note in self.notes() if note["event"] == "start"]

    def most_at_once(self) -> int:
        """The most tasks that ran at once, of those that ended."""
        notes = self.notes()
        ended = {note["pid"] for note in notes if note["event"] == "end"}
        now = [0]
        for note in (note for note in notes if note["pid"] in ended):
            now.append(now[-1] + (1 if note["event"] == "start" else -1))
        return max(now)

    def wait_for_starts(self, count: int) -> None:
        wait_until(lambda: len(self.starts()) >= count)


def all_parts(num_tasks: int) -> list[str]:
    return [f"part-{task:05d}.txt" for task in range(num_tasks)]


def wait_until(condition: Callable[[], bool], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def wait_until_gone(pids: Iterable[int]) -> None:
    for pid in pids:
        wait_until(lambda pid=pid: not runs(pid), timeout_s=300)  # type: ignore[misc]


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
