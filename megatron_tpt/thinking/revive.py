"""Records and rejects turned back into thoughts: to retry some of them, or to judge all by other filters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.records import Record, Row
from megatron_tpt.thinking.journal import Line
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.rows import OpenRow, failed_thought
from megatron_tpt.thinking.thoughts import UNKNOWN, Thought

DUPLICATE = "duplicate_id"


class BlockLines:
    """The records and rejects of a block that is done, by the rows that they came from."""

    def __init__(self, options: AugmentOptions, records: Sequence[Record], rejects: Sequence[dict[str, Any]]) -> None:
        self._records: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            document = record.meta["document_id"] if options.rollouts > 1 else record.id
            self._records.setdefault(document, []).append(asdict(record))
        self._rejects: dict[int, list[dict[str, Any]]] = {}
        for reject in rejects:
            self._rejects.setdefault(reject["row"], []).append(reject)

    def line(self, row: Row) -> Line | None:
        """The results of `row`; None where there are none."""
        rejects = self._rejects.get(row.number, [])
        if row.record is None or any(reject["reason"] == DUPLICATE for reject in rejects):
            return Line(row.number, None, [], rejects) if rejects else None
        records = self._records.get(row.record.id, [])
        return Line(row.number, row.record.id, records, rejects) if records or rejects else None


def revive(options: AugmentOptions, row: OpenRow, line: Line, count_tokens: Callable[[str], int]) -> dict[int, Thought]:
    """The thoughts that became `line`, by the number of their request; those that cannot be found are not among them.

    Of a record with several thoughts the first that was accepted has the sums (`prompt_tokens`) and the flags of all.
    `count_tokens` is for chunks of records that were written before their lengths were kept.
    """
    num_chunks = len(row.stretches)
    rejects = {_place(options, reject, num_chunks): reject for reject in line.rejects}
    records = {record["meta"]["rollout"] if options.rollouts > 1 else 0: record for record in line.records}
    thoughts: dict[int, Thought] = {}
    for rollout in range(options.rollouts):
        of_rejects = {
            chunk: _of_reject(rejects[rollout, chunk], is_alone=rollout not in records)
            for chunk in range(num_chunks)
            if (rollout, chunk) in rejects
        }
        of_record = _of_record(options, records[rollout], count_tokens) if rollout in records else {}
        for chunk, thought in (of_rejects | of_record).items():
            thoughts[rollout * num_chunks + chunk] = thought
    return thoughts


def check_lengths(options: AugmentOptions, rejects: Iterable[Mapping[str, Any]]) -> None:
    """Raise UserError for rejects that earlier versions wrote without what a thought needs to become a record."""
    if any(reject.get("thinking") is not None and "generation" not in reject for reject in rejects):
        raise UserError(
            f"{options.output}: an earlier version generated this and kept no lengths of rejected thoughts, so that "
            "--refilter cannot make records of them; --retry-rejects all retries them"
        )


def _place(options: AugmentOptions, reject: Mapping[str, Any], num_chunks: int) -> tuple[int, int]:
    """Rollout and chunk; a line about a whole document of several chunks is in the place of none."""
    rollout = int(reject["id"].rpartition("#")[2]) if options.rollouts > 1 else 0
    chunk = reject.get("chunk")
    return rollout, chunk if chunk is not None else 0 if num_chunks == 1 else -1


def _of_reject(reject: Mapping[str, Any], *, is_alone: bool) -> Thought:
    generation, text, detail = reject.get("generation") or {}, reject.get("thinking"), reject.get("detail", "")
    attempt = generation.get("attempt", 0)
    if text is None:
        return failed_thought(reject["reason"], detail, attempt)
    return Thought(
        text="",
        num_tokens=generation.get("thinking_tokens", UNKNOWN),
        truncated=is_alone and generation.get("truncated", False),
        finish_reason=generation.get("finish_reason", "stop") if is_alone else "stop",
        num_prompt_tokens=generation.get("prompt_tokens", 0) if is_alone else 0,
        reason=reject["reason"],
        rejected_text=text,
        detail=detail,
        attempt=attempt,
    )


def _of_record(
    options: AugmentOptions, record: Mapping[str, Any], count_tokens: Callable[[str], int]
) -> dict[int, Thought]:
    """The accepted thoughts of a record by chunk."""
    meta, thinking = record["meta"], record["thinking"] or ""
    whole = {"text_end": len(record["text"]), "thinking_end": len(thinking), "reason": None}
    whole["thinking_tokens"] = meta["thinking_tokens"]
    chunks = meta["chunks"] if options.long_documents == "chunk" else [whole]
    thoughts: dict[int, Thought] = {}
    begin = 0
    for number, chunk in enumerate(chunks):
        text, begin = thinking[begin : chunk["thinking_end"]], chunk["thinking_end"]
        if chunk["reason"]:
            continue
        is_first, text = not thoughts, text.removeprefix("\n\n") if number else text
        num_tokens = chunk.get("thinking_tokens")
        thoughts[number] = Thought(
            text=text,
            num_tokens=num_tokens if num_tokens is not None else count_tokens(text),
            truncated=is_first and meta["truncated"],
            finish_reason=meta["finish_reason"] if is_first else "stop",
            num_prompt_tokens=(meta.get("prompt_tokens") or 0) if is_first else 0,
            attempt=meta["sampling"].get("attempt", 0),
        )
    return thoughts
