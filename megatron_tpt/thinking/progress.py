"""How far a task of an augment run is: a line on the terminal, and a small file that others can read (`status.py`).

OUTPUT/.work/progress/task-00003-of-00064.json
"""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tpt.files import atomic_write

_FILE_EVERY_S = 5.0
_MAX_EXAMPLE = 160


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
    records_before: int = 0
    """Records in them, and in what an earlier run had begun."""
    rejects_before: Counter[str] = field(default_factory=Counter)
    """As `rejects`, of the same."""
    chunk_rejects_before: Counter[str] = field(default_factory=Counter)
    """As `chunk_rejects`, of the same."""
    truncated: int = 0
    """Records whose thinking was cut at the limit."""
    prompt_tokens: int = 0
    thinking_tokens: int = 0
    """Generated tokens, those of rejected thoughts included."""
    generation_s: float = 0.0
    """Seconds since the engine was ready."""
    input_bytes: int = 0
    """Size of this task's part of the input, as far as it is known."""
    input_bytes_done: int = 0
    """Of these, what was passed, but for rows that are being thought about."""
    input_bytes_answered: int = 0
    """Of these, what this run has thought about."""

    examples: dict[str, str] = field(default_factory=dict)
    """One reject of every reason, in words."""

    def note_rejects(self, rejects: Iterable[dict[str, Any]]) -> None:
        """Keep an example of every reason of these lines of rejects."""
        for reject in rejects:
            if reject["reason"] not in self.examples:
                self.examples[reject["reason"]] = _example(reject)

    def reject_report(self) -> list[str]:
        """A line for every reason of a reject, of earlier runs too: how many, of how many, and an example."""
        rows, chunks = self.rejects_before + self.rejects, self.chunk_rejects_before + self.chunk_rejects
        judged = self.records_before + self.records + rows.total()
        return reject_lines(rows, chunks, judged, self.examples)

    @property
    def bytes_per_s(self) -> float:
        """Input that is thought about in a second."""
        return self.input_bytes_answered / self.generation_s if self.generation_s else 0.0

    def summary(self) -> str:
        """One line for the terminal."""
        seconds = self.generation_s or float("inf")
        chunks = f", {self.chunk_rejects.total():,} chunks rejected" if self.chunk_rejects else ""
        judged = self.records + self.rejects.total()
        accepted = f"{self.records / judged:.1%} accepted, " if judged else ""
        return (
            f"{self.records:,} records ({accepted}{self.truncated:,} truncated{chunks}), "
            f"{self.shards:,} shards; "
            f"{self.prompt_tokens / seconds:,.0f} tokens/s in, {self.thinking_tokens / seconds:,.0f} out"
            + share_and_eta(self.input_bytes_done, self.input_bytes, self.bytes_per_s)
        )


def share_and_eta(done: float, whole: float, per_s: float) -> str:
    """As in "; 12% of the input, 3 h 05 min left"; nothing where the size is not known."""
    if not whole:
        return ""
    eta = f", {duration((whole - done) / per_s)} left" if per_s and done < whole else ""
    return f"; {math.floor(100 * done / whole)}% of the input{eta}"


def counts(by_reason: Counter[str]) -> str:
    """As in "loop 12, too_short 3", the most frequent first."""
    return ", ".join(f"{reason} {count:,}" for reason, count in by_reason.most_common())


def reject_lines(rows: Counter[str], chunks: Counter[str], num_judged: int, examples: Mapping[str, str]) -> list[str]:
    """What was rejected: a line for every reason, the most frequent first, with an example."""
    lines = []
    for reason, number in rows.most_common():
        share = f" ({number / num_judged:.1%})" if num_judged else ""
        lines.append(f"rejected as {reason}: {number:,}{share}" + _such_as(reason, examples))
    lines += [f"chunks rejected as {r}: {n:,}{_such_as(r, examples)}" for r, n in chunks.most_common()]
    return lines


def _such_as(reason: str, examples: Mapping[str, str]) -> str:
    return f", such as {examples[reason]}" if reason in examples else ""


def _example(reject: Mapping[str, Any]) -> str:
    """A line of the rejects in words: its place in the input, and what was written, or what went wrong."""
    place = f"{reject['source']}:{reject['row'] + 1}"
    chunk = f" (chunk {reject['chunk'] + 1})" if reject.get("chunk") is not None else ""
    thinking, detail = reject.get("thinking"), " ".join(str(reject.get("detail") or "").split())
    said = json.dumps(thinking, ensure_ascii=False) if thinking is not None else detail
    said = said if len(said) <= _MAX_EXAMPLE else f"{said[:_MAX_EXAMPLE]}..."
    return f"{place}{chunk}" + (f": {said}" if said else "")


def duration(seconds: float) -> str:
    """As in "3 h 05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


class Reporter:
    """Shows a Progress every second on a terminal, every half minute in a log, and in its file."""

    def __init__(self, progress: Progress, path: Path, input_bytes_done: Callable[[], int]) -> None:
        self._progress = progress
        self._path = path
        self._input_bytes_done = input_bytes_done
        self._start = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._interval_s = 1.0 if self._on_terminal else 30.0
        self._next_line_s = self._interval_s
        self._next_file_s = 0.0

    def show(self, *, last: bool = False) -> None:
        """To be called often; does something only when it is time."""
        elapsed_s = self._progress.generation_s = time.monotonic() - self._start
        if elapsed_s >= self._next_file_s or elapsed_s >= self._next_line_s or last:
            self._progress.input_bytes_done = self._input_bytes_done()
        if elapsed_s >= self._next_file_s or last:
            self._next_file_s = elapsed_s + _FILE_EVERY_S
            write_progress(self._progress, self._path)
        if elapsed_s >= self._next_line_s or last:
            self._next_line_s = elapsed_s + self._interval_s
            end = "\r" if self._on_terminal and not last else "\n"
            print(self._progress.summary(), end=end, file=sys.stderr, flush=True)


def task_name(task: int, num_tasks: int) -> str:
    """What the files of task `task` of `num_tasks` are called."""
    return f"task-{task:05d}-of-{num_tasks:05d}"


def progress_path(folder: Path, task: int, num_tasks: int) -> Path:
    """Where task `task` of `num_tasks` says how far it is."""
    return folder / f"{task_name(task, num_tasks)}.json"


def write_progress(progress: Progress, path: Path) -> None:
    """Put `progress` where `read_progress` finds it."""
    with atomic_write(path, durable=False) as temporary:  # surviving a power cut is of no use to anyone
        temporary.write_text(json.dumps(vars(progress)))


def read_progress(path: Path) -> Progress | None:
    """What a task has said last, None before it has."""
    try:
        fields = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # the latter after a power cut
        return None
    counters = {
        name: Counter(value) for name, value in fields.items() if isinstance(value, dict) and name != "examples"
    }
    return Progress(**fields | counters)
