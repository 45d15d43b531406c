"""Work in several processes: in order, few items in flight, and a worker that dies is named with what it was at."""

import contextlib
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_tpt.errors import Fault, UserError
from megatron_tpt.jobs.ordered_workers import map_in_order


def work(item: int, factor: int) -> int:
    if item == 13:
        raise UserError("thirteen")
    if item == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02 * (item % 3 == 0))
    return item * factor


def make_work(factor: int) -> Callable[[int], int]:
    return functools.partial(work, factor=factor)


double = functools.partial(make_work, 2)


def test_results_come_in_order_and_few_items_are_in_flight() -> None:
    before, taken = multiprocessing.active_children(), 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(13):
            taken = item
            yield item

    found = []
    for item, result in map_in_order(double, items(), 2, str):
        found.append((item, result))
        assert taken - item <= 6
    assert found == [(item, 2 * item) for item in range(13)]
    assert set(multiprocessing.active_children()) <= set(before)


def test_an_error_is_raised_in_the_place_of_its_item() -> None:
    before, found = multiprocessing.active_children(), []
    with (
        pytest.raises(UserError, match="thirteen"),
        contextlib.closing(map_in_order(double, range(30), 2, str)) as results,
    ):
        for item, _ in results:
            found.append(item)
    assert found == list(range(13))
    assert set(multiprocessing.active_children()) <= set(before)


def test_a_worker_that_dies_is_a_fault_that_names_what_was_in_flight() -> None:
    before, items = multiprocessing.active_children(), [1, 2, 20, 3]
    with pytest.raises(Fault, match=r"a worker process died .* at item \d+( to item \d+)?: run the same command again"):
        list(map_in_order(double, items, 2, "item {}".format))
    assert set(multiprocessing.active_children()) <= set(before)


SLEEPERS = """
import sys, time
sys.path.insert(0, {folder!r})
import test_ordered_workers as t
if __name__ == "__main__":
    for item, _ in t.map_in_order(t.report_and_wait, [1, 2], 2, str):
        pass
"""


def report_and_wait() -> Callable[[int], None]:
    print(os.getpid(), flush=True)
    return lambda item: time.sleep(60)


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS.format(folder=str(Path(__file__).parent)))
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cmdline").exists() and is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, workers
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False
