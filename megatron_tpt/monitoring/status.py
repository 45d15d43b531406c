"""The work of tools/status.py: find the runs and jobs in folders, and show them once or again and again."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from megatron_tpt.logs import print_result
from megatron_tpt.monitoring.job_status import is_job, read_job
from megatron_tpt.monitoring.options import StatusOptions
from megatron_tpt.monitoring.page import page
from megatron_tpt.monitoring.run_status import is_run, read_run
from megatron_tpt.monitoring.state import Status, found_in

_LOG_WIDTH = 160


def show_status(options: StatusOptions, wait: Callable[[float], object] = time.sleep) -> None:
    """Print how far the runs and jobs are. With --watch until Ctrl-C, calling `wait` between two looks.

    Raises UserError for a folder that holds none.
    """
    if not options.watch:
        _print(options, read_folders(options.folders))
        return
    try:
        _watch(options, wait)
    except KeyboardInterrupt:  # this is how watching ends
        return


def read_folders(folders: Sequence[Path], now: float | None = None) -> list[Status]:
    """The runs and jobs in folders, in their order; those in a folder of folders by their names."""
    now = time.time() if now is None else now
    return [_read(folder, now) for given in folders for folder in _found_in(given)]


def _found_in(folder: Path) -> list[Path]:
    advice = "that of a run (run.output_dir) or of a job (--output)"
    return found_in(folder, _is_shown, none="neither a run nor a job of tasks", advice=advice)


def _is_shown(folder: Path) -> bool:
    return is_run(folder) or is_job(folder)


def _read(folder: Path, now: float) -> Status:
    return read_run(folder, now) if is_run(folder) else read_job(folder, now)


def _print(options: StatusOptions, statuses: Sequence[Status]) -> None:
    if options.json:
        found = [dataclasses.asdict(status) | {"folder": str(status.folder)} for status in statuses]
        print_result(json.dumps(found, indent=None if options.watch else 2))
        return
    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
    console.print(page(statuses, console.width))


def _watch(options: StatusOptions, wait: Callable[[float], object]) -> None:
    if options.json or not sys.stdout.isatty():
        while True:
            _print(options, read_folders(options.folders))
            wait(options.interval_s)
    with Live(screen=True, auto_refresh=False) as live:
        while True:
            live.update(page(read_folders(options.folders), live.console.width), refresh=True)
            wait(options.interval_s)
