"""Tasks over processes: faults come back, and nobody is left behind."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_tpt.errors import Fault, UserError
from megatron_tpt.jobs.workers import Workers, _serve
from megatron_tpt.logs import for_worker


def count(task: tuple[Path, int]) -> Iterator[int]:
    folder, number = task
    (folder / f"{number}-by-{os.getpid()}").touch()
    yield from range(number)


def fail(task: str) -> Iterator[int]:
    yield 1
    if task == "user error":
        raise UserError("fix this")
    if task == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if task == "fault":
        raise ZeroDivisionError("a fault")
    if task == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_all_tasks_are_done_and_progress_arrives(tmp_path: Path, num_workers: int) -> None:
    with Workers(num_workers) as workers:
        progress = list(workers.run(count, [(tmp_path, number) for number in range(4)]))
        progress += workers.run(count, [(tmp_path, number) for number in range(4, 7)])
    assert sorted(progress) == sorted(i for number in range(7) for i in range(number))
    done = [path.name.split("-by-") for path in tmp_path.iterdir()]
    assert sorted(number for number, _ in done) == [str(number) for number in range(7)]
    processes = {process for _, process in done}
    assert (processes == {str(os.getpid())}) == (num_workers == 1) and len(processes) <= num_workers


def test_no_tasks_are_done_at_once() -> None:
    with Workers(2) as workers:
        assert list(workers.run(fail, [])) == []


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("user error", UserError, "fix this"),
        ("disk full", OSError, "No space left"),
        ("fault", Fault, r"worker \d+ ended with exit code 1 while at fault"),
        ("kill", Fault, r"worker \d+ was ended by SIGKILL \(out of memory\? .*--num-workers\) while at kill"),
    ],
)
def test_a_worker_that_fails_ends_the_others(task: str, error: type[Exception], message: str) -> None:
    start_s = time.monotonic()
    with pytest.raises(error, match=message), Workers(2) as workers:
        list(workers.run(fail, ["sleep", task]))
    assert time.monotonic() - start_s < 300


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, time\n"
        "from megatron_tpt.jobs.workers import Workers\n"
        "def work(task):\n"
        "    pathlib.Path(task).write_text(str(os.getpid()))\n"
        "    yield 1\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        f"    with Workers(2) as workers:\n"
        f"        list(workers.run(work, [{str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, str(program)])
    workers = [_wait_for(tmp_path / name) for name in "ab"]
    process.kill()
    process.wait()
    deadline_s = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline_s, "a worker outlived its parent"
        time.sleep(0.05)


def _wait_for(path: Path) -> int:
    deadline_s = time.monotonic() + 120
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return int(path.read_text())


def report_without_end(task: str) -> Iterator[int]:
    while True:
        yield 1


def test_a_worker_whose_parent_no_longer_listens_ends_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, for_worker()))
    process.start()
    theirs.close()
    ours.send((report_without_end, ""))
    assert ours.recv() == ("progress", 1)
    ours.close()
    process.join(60)
    assert process.exitcode == 1
    assert capfd.readouterr().err == ""
