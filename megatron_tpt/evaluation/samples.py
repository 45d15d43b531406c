"""What models answered: kept as it comes, in journals, and in the end graded in one file.

FOLDER/settings.json              what the answers were asked with; a run with other settings is refused
FOLDER/engine.json                what they were computed in, and on which machines, see `Store.note_engine`
FOLDER/grading.json               how the samples were graded; without it they are graded again
FOLDER/.answers-00000.jsonl       answers as they finish, a journal for each task; gone when all are graded
FOLDER/samples.jsonl.zst          every answer with its grade, by problem and number; of documents, without grades

An answer is known by (model, depth, benchmark), which are the folder, and its prompt's hash, its problem's id and its
number.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from megatron_tpt.errors import Fault, UserError
from megatron_tpt.files import no_links, write_json
from megatron_tpt.jobs.journal import append, encode, read_journal
from megatron_tpt.jobs.lock import exclusive
from megatron_tpt.json_data import read_object
from megatron_tpt.names import counted
from megatron_tpt.records import describe, expand_sources, read_rows, write_json_lines

FAILED = "failed"
"""The finish reason of a request that ended in a failure; it is asked again by the next run."""
_JOURNALS = ".answers-*.jsonl"
_REMOVE = "remove it"


class Key(NamedTuple):
    """Which answer of a benchmark and a model."""

    prompt_hash: str
    id: str
    sample: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered: an entry of a journal."""

    id: str
    sample: int
    """Its number among the answers to this problem, from 0."""
    prompt_hash: str
    """Of the text that the model continued, see `hash_of`."""
    output: str
    """For log-likelihood: the likeliest option. Of a document: nothing."""
    finish_reason: str
    """"stop", "length", "scored" (log-likelihood, documents) or "failed"."""
    output_tokens: int = 0
    """Of a document: its own, which were scored."""
    thinking_tokens: int = 0
    """Of these, those up to the last "</think>", or all where thinking never ended."""
    log_likelihoods: list[float] = field(default_factory=list)
    """Of every option, before they are divided by anything; of every window of a document."""
    depths: dict[str, int] = field(default_factory=dict)
    """With early exit: its tokens by the iterations after which they were chosen."""
    failure: str = ""
    """Why the request failed."""

    @property
    def key(self) -> Key:
        """Which answer it is."""
        return Key(self.prompt_hash, self.id, self.sample)


@dataclass(frozen=True, kw_only=True)
class Sample(Answer):
    """An answer and its grade: a line of samples.jsonl.zst."""

    prompt: str
    extracted: str | None
    """The answer as it was read; None when none was found."""
    reference: Any
    """As the row has it: text, number, boolean or a list of them, or several columns by their names."""
    correct: bool
    tier: str | None = None
    """What decided that the answer is right: "text", "number", "value" (of literals), "math-verify",
    "instructions" or "tests"."""
    reason: str | None = None
    """Why it is wrong: "no answer", "thinking not closed", "different", "failed", "time-out", "crash" or "request
    failed"."""
    detail: str = ""
    """More on the reason, such as the exception of a program."""

    @property
    def answer_tokens(self) -> int:
        """The tokens after the thinking."""
        return self.output_tokens - self.thinking_tokens


def hash_of(text: str) -> str:
    """A short digest of a prompt."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Store:
    """The answers of one model, at one depth, to one benchmark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings_path = folder / "settings.json"
        self.samples_path = folder / "samples.jsonl.zst"
        self._engine_path = folder / "engine.json"
        self._grading_path = folder / "grading.json"

    def answers(self, keys: Iterable[Key]) -> dict[Key, Answer]:
        """Those of `keys` that are here, graded or not; one that failed only where no later one is there."""
        wanted, found = set(keys), dict[Key, Answer]()
        for answer in (*self._read(Answer), *self._journaled()):
            if answer.key in wanted and (answer.finish_reason != FAILED or answer.key not in found):
                found[answer.key] = answer
        return found

    def samples(self) -> list[Sample]:
        """The graded answers; none before all are there."""
        return self._read(Sample)

    def _read[Kind: Answer](self, kind: type[Kind]) -> list[Kind]:
        if not self.samples_path.exists():
            return []
        [source] = expand_sources([self.samples_path])
        found = []
        try:
            for row in read_rows(source):
                if row.value is None:
                    raise UserError(describe(source, row, "remove the file: its answers are asked again"))
                found.append(kind(**_known(kind, row.value)))
            return found
        except TypeError as error:
            raise UserError(
                f"{self.samples_path}: not samples of this program ({error}); choose another --output"
            ) from error

    def note_engine(self, dtype: str | None, run: Mapping[str, Any]) -> None:
        """Keep what an engine computes answers in, which "auto" decides by the model and the machine, and what else is
        to be known of a run that adds answers.

        Raises UserError where those that are here were computed in something else.
        """
        with exclusive(self.folder / ".engine.lock", self._engine_path.name, timeout_s=60):
            before, runs = self.dtype(), self.runs()
            if None not in (before, dtype) and before != dtype:
                raise UserError(
                    f"{self.folder}: its answers were computed in {before}, and the engine on this machine computes in "
                    f"{dtype}; continue on the same kind of machine, or choose another --output and give --dtype"
                )
            if run not in runs:
                runs.append(dict(run))
            in_order = sorted(runs, key=lambda each: json.dumps(each, sort_keys=True))  # whichever task was first
            write_json(self._engine_path, {"dtype": dtype or before, "runs": in_order})

    def dtype(self) -> str | None:
        """What the answers were computed in; None where the engine did not say."""
        dtype = read_object(self._engine_path, _REMOVE).get("dtype")
        return dtype if isinstance(dtype, str) else None

    def runs(self) -> list[dict[str, Any]]:
        """What runs that added answers noted of themselves, each once; none in folders of earlier versions."""
        runs = read_object(self._engine_path, _REMOVE).get("runs")
        return [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []

    def grading(self) -> dict[str, Any]:
        """How the samples were graded, as given to `finish`; empty where that is not known."""
        return read_object(self._grading_path, _REMOVE)

    def journal(self, task: int) -> "Journal":
        """The journal of a task, which holds the lock of the task."""
        return Journal(self.folder / _JOURNALS.replace("*", f"{task:05d}"))

    def finish(self, samples: Sequence[Answer], grading: Mapping[str, Any] | None = None) -> None:
        """Write the answers, with their grades if they have any, in place of those before, and remove the journals that
        they came from. `grading` says how they were graded; stopped in between, nothing does."""
        self._grading_path.unlink(missing_ok=True)
        write_json_lines(self.samples_path, map(asdict, samples))
        if grading is not None:
            write_json(self._grading_path, grading)
        for path in self.folder.glob(_JOURNALS):
            path.unlink(missing_ok=True)

    def has_answers(self) -> bool:
        """Whether anything was answered, graded or not."""
        return self.samples_path.exists() or any(path.stat().st_size for path in self.folder.glob(_JOURNALS))

    def restart(self, settings: Mapping[str, Any]) -> None:
        """Take on other settings, as a folder without answers may."""
        self._engine_path.unlink(missing_ok=True)
        write_json(self.settings_path, settings)

    def has_journals(self) -> bool:
        """Whether there are answers that no graded file has taken up."""
        return any(self.folder.glob(_JOURNALS))

    def _journaled(self) -> Iterator[Answer]:
        for path in sorted(self.folder.glob(_JOURNALS)):
            for entry in read_journal(path):
                yield Answer(**_known(Answer, entry.fields))


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {each.name for each in fields(cls)}
    return {name: value for name, value in values.items() if name in names}


class Journal:
    """Adds answers to a journal; the part after its last whole line is cut off first. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        end = max((entry.end for entry in read_journal(self._path)), default=0)
        self._file = open(self._path, "ab", buffering=0, opener=no_links)
        self._file.truncate(end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, answer: Answer) -> None:
        """Add an answer: a process that is killed loses none that was added."""
        append(self._file.fileno(), self._path, encode([asdict(answer)]))


def require_complete(answers: Mapping[Key, Answer], keys: Sequence[Key], *, rescore: bool = False) -> None:
    """Raise unless there is an answer for every key: N samples asked are N samples. A Fault, which the same command
    may do away with; with `rescore`, which asks for nothing, a UserError."""
    if missing := len(set(keys) - answers.keys()):
        message = f"{missing:,} of {counted(len(keys), 'answer')} missing"
        if rescore:
            raise UserError(f"{message}; run without --rescore first")
        raise Fault(f"{message}; run the same command again")
