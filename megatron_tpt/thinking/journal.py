"""What is finished of one block of the input, on the disk the moment it is finished.

    OUTPUT/.work/journal/part-00003-00017.jsonl

A block is some consecutive rows of a source; it becomes one shard. While it is in progress every finished row is a line
of its journal, written with one system call: kill -9 loses only what was still being thought about. When all rows are
there, the shard is made from the journal and the journal is removed; so a block is done when its shard (or, if every
row was rejected, its rejects) is there and its journal is not.

One process has a journal at a time: it is locked while it is open (see `task_lock` on the locks of file systems).
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from megatron_tpt.files import atomic_write, no_links
from megatron_tpt.jobs.journal import append, encode, read_journal
from megatron_tpt.jobs.lock import TaskLocked, locked

_LOCK_TIMEOUT_S = 10.0
_SUFFIX = ".jsonl"


class Line(NamedTuple):
    """All results of one row of the input."""

    row: int
    id: str | None
    """The record's id; None where there is no record, or where the id was another row's before."""
    records: list[dict[str, Any]]
    rejects: list[dict[str, Any]]


class Answer(NamedTuple):
    """The answer to one of the several requests of a row that is not finished."""

    row: int
    request: int
    answer: dict[str, Any]


class Journal:
    """The journal of one block, new or resumed."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when `path` cannot be made or written, TaskLocked when another process has it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = _open_locked(path)
        # Where in the file the rows are, and the answers of rows that are not finished: begin and length.
        self._rows: dict[int, tuple[int, int]] = {}
        self._answers: dict[int, dict[int, tuple[int, int]]] = {}
        self._end = 0
        for line, begin, end in read_journal(path):
            self._note(line, begin, end - begin)
            self._end = end
        os.ftruncate(self._file, self._end)

    def _note(self, line: dict[str, Any], begin: int, length: int) -> None:
        if "request" in line:
            self._answers.setdefault(line["row"], {})[line["request"]] = begin, length
        else:
            self._rows[line["row"]] = begin, length
            self._answers.pop(line["row"], None)

    def _read(self, begin: int, length: int) -> dict[str, Any]:
        return json.loads(os.pread(self._file, length, begin))

    @property
    def is_new(self) -> bool:
        """Whether nothing is in it."""
        return self._end == 0

    def __contains__(self, row: int) -> bool:
        """Whether row number `row` is finished."""
        return row in self._rows

    def answer(self, row: int, request: int) -> dict[str, Any] | None:
        """What `add_answer` was given for this request of a row that is not finished."""
        place = self._answers.get(row, {}).get(request)
        return self._read(*place)["answer"] if place else None

    def add_answer(self, row: int, request: int, answer: dict[str, Any]) -> None:
        """Keep the answer to one of the several requests of a row that is not finished."""
        self._append(Answer(row, request, answer)._asdict())

    def answers(self) -> Iterator["Answer"]:
        """All answers of rows that are not finished."""
        for row, requests in self._answers.items():
            yield from (Answer(row, request, self._read(*place)["answer"]) for request, place in requests.items())

    def add(self, line: Line) -> None:
        """Keep the results of a row, which is then finished."""
        assert line.row not in self, f"row {line.row} is finished twice"
        self._append(line._asdict())

    def _append(self, line: dict[str, Any]) -> None:
        raw = encode([line])
        append(self._file, self.path, raw)
        self._note(line, self._end, len(raw))
        self._end += len(raw)

    def line(self, row: int) -> Line:
        """The results of a finished row."""
        return Line(**self._read(*self._rows[row]))

    def lines(self) -> Iterator[Line]:
        """All finished rows, in the order of the input."""
        return map(self.line, sorted(self._rows))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the file for the next run."""
        os.close(self._file)

    def remove(self) -> None:
        """The block is written out."""
        self.path.unlink()
        self.close()


def holds_answers(path: Path) -> bool:
    """Whether a journal holds more than rows of the input that are no documents."""
    with path.open("rb") as file:
        return any(b'"request": ' in raw or b'"id": null, "records"' not in raw for raw in file)


def write_journal(path: Path, lines: Iterable[Line | Answer]) -> None:
    """A journal in place of the one at `path`, or where there is none: whole or not at all, so that its block is open
    from then on with all that is kept of it."""
    for leftover in path.parent.glob(f".tmp-*-{path.name}"):  # of a run that was killed here
        leftover.unlink(missing_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        for line in lines:
            file.write(encode([line._asdict()]))


def _open_locked(path: Path) -> int:
    while True:
        file = no_links(str(path), os.O_RDWR | os.O_CREAT | os.O_APPEND)
        if not locked(file, path, timeout_s=_LOCK_TIMEOUT_S):
            os.close(file)
            raise TaskLocked(
                f"{path}: another process is at work on these rows, as of a run of the same job with another "
                "--num-tasks; wait for it, or stop it"
            )
        if os.fstat(file).st_nlink:
            return file
        os.close(file)  # finished and removed by its holder, while we waited


def name_of(path: Path) -> str:
    """The block's name in the name of its journal."""
    return path.name.removesuffix(_SUFFIX)


def path_of(folder: Path, name: str) -> Path:
    """Where the journal of the block called `name` is."""
    return folder / f"{name}{_SUFFIX}"
