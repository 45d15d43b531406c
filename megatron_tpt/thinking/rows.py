"""One row of the input: what to ask the generator about it, and the records made of the answers."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_tpt.generation import Completion, Failure, derive_seed
from megatron_tpt.records import Record, Row
from megatron_tpt.thinking.journal import Journal, Line
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.prompts import Documents, Part, Prompt, Template
from megatron_tpt.thinking.thoughts import UNKNOWN, Thought, ThoughtReader

ENGINE = "engine_"
"""What reasons begin with that are the engine's."""

type Outcome = Completion | Failure
type Answered = Outcome | Thought
"""An outcome, or what an earlier run has made of one."""


@dataclass
class OpenRow:
    """A row that is being thought about. Its requests are numbered rollout by rollout, chunk by chunk."""

    number: int
    record: Record
    source: str
    stretches: list[tuple[Part, int]]
    """What is asked about, and where each ends in the text, in characters."""
    num_document_tokens: int
    num_requests: int
    outcomes: dict[int, Answered] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    """For retries of a rejected thought: the number of this one, from 1."""
    num_bytes: int = 0
    """Its part of the input file, packed as it is there."""

    @property
    def is_done(self) -> bool:
        return len(self.outcomes) == self.num_requests


class RowWorker:
    """Turns rows into prompts and answers into records, by one set of options."""

    def __init__(
        self, options: AugmentOptions, template: Template, documents: Documents, prompt: Prompt, reader: ThoughtReader
    ) -> None:
        self._options = options
        self._template = template
        self._documents = documents
        self._prompt = prompt
        self._reader = reader
        # The columns that only the prompt needs come with the record and go again.
        self._prompt_columns = [name for name in template.placeholders if name in options.text_columns()]

    def open(self, row: Row, source: str, journal: Journal | None = None) -> OpenRow:
        """Cut the document as the options say, and recall the answers that the journal has."""
        assert row.record is not None
        text = row.record.text
        if self._options.long_documents == "chunk":
            stretches = list(self._documents.chunks(text))
            num_tokens = sum(len(part.ids) for part, _ in stretches)
        else:
            part, num_tokens = self._documents.first(text)
            stretches = [(part, len(part.text) if self._options.text == "truncated" else len(text))]
        num_requests = self._options.rollouts * len(stretches)
        opened = OpenRow(row.number, row.record, source, stretches, num_tokens, num_requests)
        for request in range(num_requests if journal else 0):
            if journal and (answer := journal.answer(row.number, request)) is not None:
                _recall(opened, request, answer)
        return opened

    def requests(self, row: OpenRow) -> Iterator[tuple[int, Any, int]]:
        """Number, prompt and seed of the requests that are not answered."""
        columns = {name: row.record.meta[name] for name in self._prompt_columns}
        for request in range(row.num_requests):
            if request not in row.outcomes:
                rollout, chunk = divmod(request, len(row.stretches))
                names = (row.record.id,) if row.num_requests == 1 else (row.record.id, rollout, chunk)
                again = ("attempt", row.attempts[request]) if request in row.attempts else ()
                seed = derive_seed(self._options.seed, *names, *again)
                yield request, self._prompt.fill(row.stretches[chunk][0], columns, seed), seed

    def answered(self, row: OpenRow, request: int, outcome: Outcome, journal: Journal) -> None:
        """Take an answer; it is in the journal when this returns, unless the row is finished by it."""
        row.outcomes[request] = outcome
        if not row.is_done:
            journal.add_answer(row.number, request, answer_fields(outcome, row.attempts.get(request, 0)))

    def close(self, row: OpenRow) -> Line:
        """The records and rejects of a row whose requests are all answered."""
        line = Line(row.number, row.record.id, [], [])
        num_chunks = len(row.stretches)
        for rollout in range(self._options.rollouts):
            thoughts = [self._thought(row, rollout * num_chunks + chunk) for chunk in range(num_chunks)]
            if all(thought.reason for thought in thoughts):
                line.rejects.append(self._reject(row, rollout, thoughts[0]))
            else:
                line.records.append(asdict(self._record(row, rollout, thoughts)))
            if num_chunks > 1:
                dropped = [(chunk, thought) for chunk, thought in enumerate(thoughts) if thought.reason]
                line.rejects.extend(self._reject(row, rollout, thought, chunk) for chunk, thought in dropped)
        return line

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` in the generator's vocabulary."""
        return self._documents.count(text)

    def judge_again(self, row: OpenRow) -> None:
        """Judge the thoughts of a row by the filters of this worker, whatever other filters decided."""
        for request, outcome in row.outcomes.items():
            if isinstance(outcome, Thought):
                document = row.stretches[request % len(row.stretches)][0].text
                row.outcomes[request] = self._reader.judge_again(document, outcome)

    def _thought(self, row: OpenRow, request: int) -> Thought:
        outcome, attempt = row.outcomes[request], row.attempts.get(request, 0)
        if isinstance(outcome, Thought):
            return outcome
        if isinstance(outcome, Completion):
            document = row.stretches[request % len(row.stretches)][0].text
            return replace(self._reader.read(document, outcome), attempt=attempt)
        return failed_thought(f"{ENGINE}{outcome.reason}", outcome.message, attempt)

    def _record(self, row: OpenRow, rollout: int, thoughts: list[Thought]) -> Record:
        thinking, chunks = "", []
        for thought, (_, end) in zip(thoughts, row.stretches, strict=True):
            thinking += ("\n\n" if thinking and thought.text else "") + thought.text
            num_tokens = 0 if thought.reason else thought.num_tokens
            chunks.append(
                {
                    "text_end": end,
                    "thinking_end": len(thinking),
                    "reason": thought.reason,
                    "thinking_tokens": num_tokens,
                }
            )
        meta = self._meta(row, rollout) | {
            "finish_reason": "length" if any(t.finish_reason == "length" for t in thoughts) else "stop",
            "document_tokens": row.num_document_tokens,
            "thinking_tokens": sum(thought.num_tokens for thought in thoughts if not thought.reason),
            "prompt_tokens": sum(thought.num_prompt_tokens for thought in thoughts),
            "truncated": any(thought.truncated for thought in thoughts),
        }
        if attempt := max(thought.attempt for thought in thoughts):
            meta["sampling"]["attempt"] = attempt
        if self._options.long_documents == "chunk":
            meta["chunks"] = chunks
        return Record(self._id(row, rollout), row.record.text[: row.stretches[-1][1]], thinking, meta)

    def _meta(self, row: OpenRow, rollout: int) -> dict[str, Any]:
        options = self._options
        kept = {
            name: value
            for name, value in row.record.meta.items()
            if name not in self._prompt_columns or name in options.meta_columns
        }
        meta = kept | {
            "source": row.source,
            "generator": options.model,
            "prompt": self._template.name,
            "sampling": {
                "temperature": None if "temperature" in options.omitted() else options.temperature,
                "top_p": None if "top_p" in options.omitted() else options.top_p,
                "max_new_tokens": options.max_new_tokens,
                "seed": options.seed,
            },
        }
        return meta | ({"document_id": row.record.id, "rollout": rollout} if options.rollouts > 1 else {})

    def _id(self, row: OpenRow, rollout: int) -> str:
        return row.record.id if self._options.rollouts == 1 else f"{row.record.id}#{rollout}"

    def _reject(self, row: OpenRow, rollout: int, thought: Thought, chunk: int | None = None) -> dict[str, Any]:
        reject = make_reject(self._id(row, rollout), row.source, row.number, thought.reason or "", thought.detail)
        if chunk is not None or len(row.stretches) == 1:  # else the texts are with the chunks
            reject["thinking"] = thought.rejected_text
            if thought.num_tokens != UNKNOWN:
                reject["generation"] = _generation(thought)
        return reject | {"chunk": chunk}


def _generation(thought: Thought) -> dict[str, Any]:
    """What a rejected thought needs in addition to its text to become a record by other filters."""
    return {
        "finish_reason": thought.finish_reason,
        "truncated": thought.truncated,
        "thinking_tokens": thought.num_tokens,
        "prompt_tokens": thought.num_prompt_tokens,
        "attempt": thought.attempt,
    }


def make_reject(record_id: str | None, source: str, row: int, reason: str, detail: str = "") -> dict[str, Any]:
    """A line of the rejects: which row of the input was rejected, and why. Of a row with several chunks there is a line
    for each rejected one, with its number, and one for the row where all were rejected."""
    place = {"id": record_id, "source": source, "row": row, "chunk": None}
    return place | {"reason": reason, "detail": detail, "thinking": None}


def count_rejects(rejects: Iterable[dict[str, Any]]) -> tuple[Counter[str], Counter[str]]:
    """How many rows (or rollouts), and how many chunks, were rejected for which reason."""
    of_rows, of_chunks = Counter[str](), Counter[str]()
    for reject in rejects:
        (of_rows if reject.get("chunk") is None else of_chunks)[reject["reason"]] += 1
    return of_rows, of_chunks


def failed_thought(reason: str, detail: str, attempt: int) -> Thought:
    """What is in the place of a thought where the engine wrote none."""
    return Thought("", 0, False, "failed", 0, reason, None, detail, attempt)


def answer_fields(outcome: Answered | None, attempt: int) -> dict[str, Any]:
    """`outcome` as a journal keeps it; None is a request to retry."""
    fields = asdict(outcome) if outcome is not None else {}
    for name in ("token_ids", "log_probabilities", "weight_version"):
        fields.pop(name, None)
    return fields | ({"attempt": attempt} if attempt or outcome is None else {})


def _recall(row: OpenRow, request: int, answer: dict[str, Any]) -> None:
    """Take what `answer_fields` has put into a journal."""
    if "truncated" in answer:
        row.outcomes[request] = Thought(**answer)
        return
    fields = {name: value for name, value in answer.items() if name != "attempt"}
    if answer.get("attempt"):
        row.attempts[request] = answer["attempt"]
    if fields:
        row.outcomes[request] = Failure(**fields) if "message" in fields else Completion(token_ids=(), **fields)
