"""Progress of a job: a line on the terminal, and a small file per task for other processes (see folder.py)."""

import contextlib
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron_tpt.files import atomic_write
from megatron_tpt.units import duration

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

logger = logging.getLogger(__name__)

_TERMINAL_EVERY_S = 1.0
_LOG_EVERY_S = 30.0
_FILE_EVERY_S = 5.0


class ProgressLine:
    """A line with the progress of a job: on a terminal it is updated in place every second; in a log it is repeated
    every half minute.

        with ProgressLine() as line:
            for item in items:
                line.show(lambda: f"{count:,} items")

    Other output appears above the line, which disappears at the end of the block.
    """

    def __init__(self, log_every_s: float = _LOG_EVERY_S) -> None:
        self._start_s = time.monotonic()
        self._live = _terminal_line() if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO) else None
        self._interval_s = _TERMINAL_EVERY_S if self._live else log_every_s
        self._next_s = self._interval_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start_s

    def show(self, text: Callable[[], str]) -> None:
        """Call it often; it only updates the line, and calls `text`, at intervals."""
        if self.elapsed_s < self._next_s:
            return
        self._next_s = self.elapsed_s + self._interval_s
        if self._live is None:
            logger.info(text())
            return
        if not self._live.is_started:
            self._live.start()
            self._live.console.show_cursor()  # if the process were killed, the cursor would stay hidden
        self._live.update(_one_line(text()), refresh=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()


def _one_line(text: str) -> "Text":
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ellipsis")


def _terminal_line() -> "Live":
    from rich.console import Console
    from rich.live import Live

    # Redirect stdout only if it is the terminal.
    to_terminal = sys.stdout.isatty()
    return Live(console=Console(stderr=True), auto_refresh=False, transient=True, redirect_stdout=to_terminal)


@contextlib.contextmanager
def every(interval_s: float, do: Callable[[], object]) -> Iterator[None]:
    """Call `do` every `interval_s` seconds during the block, in a separate thread."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(interval_s):
            do()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass
class Progress:
    """The progress of one task since it was started. Jobs add fields, which are written as JSON."""

    input_bytes: int = 0
    """Size of this task's part of the input, if known."""
    input_bytes_done: int = 0
    """The bytes of it that are done, including those done before this start."""

    def summary(self) -> str:
        """One line for the terminal."""
        raise NotImplementedError


class Reporter:
    """During a `with` block, shows a Progress as a line and writes it to its file."""

    def __init__(
        self, progress: Progress, path: Path, update: Callable[[float], object] = lambda elapsed_s: None
    ) -> None:
        """`update` is called before the progress is shown, with the seconds since the start."""
        self._progress = progress
        self._path = path
        self._update = update
        self._line = ProgressLine()
        self._next_file_s = 0.0

    def show(self) -> None:
        """Call it often; it only updates line and file at intervals."""
        if self._line.elapsed_s >= self._next_file_s:
            self._next_file_s = self._line.elapsed_s + _FILE_EVERY_S
            self._update(self._line.elapsed_s)
            write_progress(self._progress, self._path)
        self._line.show(self._summary)

    def _summary(self) -> str:
        self._update(self._line.elapsed_s)
        return self._progress.summary()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.__exit__()
        summary = self._summary()
        write_progress(self._progress, self._path)
        logger.info(summary)


def write_progress(progress: Progress, path: Path) -> None:
    """Write `progress` to a file for `read_fields`."""
    with atomic_write(path, durable=False) as temporary:  # it need not survive a power failure
        temporary.write_text(json.dumps(vars(progress)))


def read_fields(path: Path) -> dict[str, Any] | None:
    """The fields that a task last reported; None if it has not reported yet."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # the latter after a power failure
        return None


def share_and_eta(done: float, whole: float, per_s: float) -> str:
    """As in "; 12% of the input, 3 h 05 min left"; empty if the size is not known."""
    if not whole:
        return ""
    eta = f", {duration((whole - done) / per_s)} left" if per_s and done < whole else ""
    return f"; {math.floor(100 * done / whole)}% of the input{eta}"
