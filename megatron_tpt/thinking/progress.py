"""How far an augment run is: a line on the terminal, and a small file that others can read.

OUTPUT/.work/progress/task-00000.json
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_FILE_EVERY_S = 5.0


@dataclass
class Progress:
    """What one task has done since it was started."""

    records: int = 0
    """Records written, or ready to be."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Rows of the input, or rollouts, that came to nothing, by reason."""
    chunk_rejects: Counter[str] = field(default_factory=Counter)
    """Chunks that came to nothing, by reason."""
    shards: int = 0
    shards_skipped: int = 0
    """Shards that were there already."""
    truncated: int = 0
    """Records whose thinking was cut at the limit."""
    prompt_tokens: int = 0
    thinking_tokens: int = 0
    """Generated tokens, those of rejected thoughts included."""
    generation_s: float = 0.0
    """Seconds since the engine was ready."""
    input_bytes: int = 0
    """Size of this task's input, as far as it is known."""
    input_bytes_read: int = 0
    input_bytes_skipped: int = 0
    """Of these, what belonged to shards that were there when the task began."""

    @property
    def accepted(self) -> float:
        """Share of the documents that became records."""
        ends = self.records + self.rejects.total()
        return self.records / ends if ends else 1.0

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end of the input at the speed so far; None while nothing is known."""
        done = self.input_bytes_read - self.input_bytes_skipped
        left = self.input_bytes - self.input_bytes_read
        return left * self.generation_s / done if done > 0 and self.input_bytes and left >= 0 else None

    def summary(self) -> str:
        """One line for the terminal."""
        seconds = self.generation_s or float("inf")
        eta_s = self.eta_s
        chunks = f", {self.chunk_rejects.total():,} chunks rejected" if self.chunk_rejects else ""
        return (
            f"{self.records:,} records ({self.accepted:.1%} accepted, {self.truncated:,} cut{chunks}), "
            f"{self.shards:,} shards; "
            f"{self.prompt_tokens / seconds:,.0f} tokens/s in, {self.thinking_tokens / seconds:,.0f} out"
            + (f"; {self.input_bytes_read / self.input_bytes:.0%} of the input" if self.input_bytes else "")
            + (f", {duration(eta_s)} left" if eta_s else "")
        )

    def merge(self, other: "Progress") -> None:
        """Add what another task has done at the same time."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            elif name == "generation_s":
                self.generation_s = max(self.generation_s, value)
            else:
                setattr(self, name, getattr(self, name) + value)


def counts(by_reason: Counter[str]) -> str:
    """As in "loop 12, too_short 3", the most frequent first."""
    return ", ".join(f"{reason} {count:,}" for reason, count in by_reason.most_common())


def duration(seconds: float) -> str:
    """As in "3 h 05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


class Reporter:
    """Shows a Progress every second on a terminal, every half minute in a log, and in its file."""

    def __init__(self, progress: Progress, path: Path, input_bytes_read: Callable[[], int]) -> None:
        self._progress = progress
        self._path = path
        self._input_bytes_read = input_bytes_read
        self._start = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._interval_s = 1.0 if self._on_terminal else 30.0
        self._next_line_s = self._interval_s
        self._next_file_s = 0.0

    def show(self, *, last: bool = False) -> None:
        """To be called often; does something only when it is time."""
        elapsed_s = self._progress.generation_s = time.monotonic() - self._start
        if elapsed_s >= self._next_file_s or last:
            self._next_file_s = elapsed_s + _FILE_EVERY_S
            self._progress.input_bytes_read = self._input_bytes_read()
            self._write()
        if elapsed_s >= self._next_line_s or last:
            self._next_line_s = elapsed_s + self._interval_s
            end = "\r" if self._on_terminal and not last else "\n"
            print(self._progress.summary(), end=end, file=sys.stderr, flush=True)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".tmp-{os.getpid()}-{self._path.name}")
        temporary.write_text(json.dumps(vars(self._progress)))
        temporary.replace(self._path)  # never a part of it; that it survives a power cut is of no use to anyone


@contextlib.contextmanager
def show_total(folder: Path) -> Iterator[None]:
    """Meanwhile show every half minute what all tasks with a file in `folder` have done together."""
    ended = threading.Event()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("task-*.json")}

    def show() -> None:
        while not ended.wait(30.0):
            # Files that have not changed are of an earlier run.
            paths = [path for path in folder.glob("task-*.json") if path.stat().st_mtime_ns != before.get(path)]
            print(read_progress(paths).summary(), file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def read_progress(paths: Iterable[Path]) -> Progress:
    """What the tasks with these files have done together."""
    total = Progress()
    for path in paths:
        fields = json.loads(path.read_text())
        total.merge(Progress(**fields | {name: Counter(fields[name]) for name in ("rejects", "chunk_rejects")}))
    return total
