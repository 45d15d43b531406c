"""How far a job is: a line on the terminal, and for each task a small file that others can read (see folder.py)."""

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
    """A line that says how far a job is: on a terminal it is in one place and changes every second; in a log it is
    repeated every half minute.

        with ProgressLine() as line:
            for item in items:
                line.show(lambda: f"{count:,} items")

    What is printed meanwhile comes above the line, which is gone at the end of the block.
    """

    def __init__(self, log_every_s: float = _LOG_EVERY_S) -> None:
        self._start_s = time.monotonic()
        self._live = _terminal_line() if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO) else None
        self._interval_s = _TERMINAL_EVERY_S if self._live else log_every_s
        self._next_s = self._interval_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._start_s

    def show(self, text: Callable[[], str]) -> None:
        """To be called often; does something, and calls `text`, only when it is time."""
        if self.elapsed_s < self._next_s:
            return
        self._next_s = self.elapsed_s + self._interval_s
        if self._live is None:
            logger.info(text())
            return
        if not self._live.is_started:
            self._live.start()
            self._live.console.show_cursor()  # which a killed process could not do any more
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

    # What goes to stdout stays there where that is another place than the terminal.
    to_terminal = sys.stdout.isatty()
    return Live(console=Console(stderr=True), auto_refresh=False, transient=True, redirect_stdout=to_terminal)


@contextlib.contextmanager
def every(interval_s: float, do: Callable[[], object]) -> Iterator[None]:
    """Call `do` every so often during the block, in a thread of its own."""
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
    """What one task has done since it was started. A job adds fields of its own, which become JSON."""

    input_bytes: int = 0
    """Size of this task's part of the input, if known."""
    input_bytes_done: int = 0
    """Of these, what is done or was done before."""

    def summary(self) -> str:
        """One line for the terminal."""
        raise NotImplementedError


class Reporter:
    """Shows a Progress as a line, and keeps it in its file, during a `with` block."""

    def __init__(
        self, progress: Progress, path: Path, update: Callable[[float], object] = lambda elapsed_s: None
    ) -> None:
        """`update` is called before the progress is shown, with the seconds since the beginning."""
        self._progress = progress
        self._path = path
        self._update = update
        self._line = ProgressLine()
        self._next_file_s = 0.0

    def show(self) -> None:
        """To be called often; does something only when it is time."""
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
    """Put `progress` where `read_fields` finds it."""
    with atomic_write(path, durable=False) as temporary:  # it need not survive a power cut
        temporary.write_text(json.dumps(vars(progress)))


def read_fields(path: Path) -> dict[str, Any] | None:
    """The fields of what a task has reported last, None before it has."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # the latter after a power cut
        return None


def share_and_eta(done: float, whole: float, per_s: float) -> str:
    """As in "; 12% of the input, 3 h 05 min left"; nothing where the size is not known."""
    if not whole:
        return ""
    eta = f", {duration((whole - done) / per_s)} left" if per_s and done < whole else ""
    return f"; {math.floor(100 * done / whole)}% of the input{eta}"
