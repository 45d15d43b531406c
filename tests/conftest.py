"""Shared by all tests."""

import gc
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from slurm_cluster import missing_programs, slurm_cluster

from megatron_tpt import logs

# Two cores for everything: torch's threads would fight each other, and the figures of a run depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell has its background jobs ignore Ctrl-C, and the programs that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests call what programs call, and read what these show.
logs.configure()

# A busy machine is no fault of a test.
settings.register_profile("any speed", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    needing = [item for item in items if "cluster" in getattr(item, "fixturenames", ())]
    if needing and (missing := missing_programs()):
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            names = ", ".join(missing)
            reporter.write_line(
                f"{len(needing)} SLURM tests are skipped: {names} not found (.ci/packages.sh installs them)"
            )
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]
    if config.option.markexpr in ("slow", "example"):
        items.sort(key=_minutes_of_files(items, config.option.markexpr), reverse=True)


def _minutes_of_files(items: list[pytest.Item], mark_name: str) -> Callable[[pytest.Item], float]:
    """Give the order in which files start that run at once: with the longest last, one process would end alone."""
    minutes: dict[Path, float] = defaultdict(float)
    for item in items:
        if mark := item.get_closest_marker(mark_name):
            minutes[item.path] += mark.kwargs.get("minutes", 0.2)
    return lambda item: minutes[item.path]


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """Free the process groups of a test that trained in this process, whose threads poll as long as they live."""
    before = len(os.listdir("/proc/self/task"))
    yield
    if len(os.listdir("/proc/self/task")) >= before + 10:
        for _ in range(3):  # a trainer's cycles go through C++, and are freed in turns
            gc.collect()


@pytest.fixture(scope="session")
def cluster():
    """A real SLURM of one node with two cores, which allows arrays of at most four tasks."""
    with slurm_cluster(num_cpus=2, max_array_size=4) as cluster:
        yield cluster.folder
