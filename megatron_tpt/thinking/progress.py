"""How far a task of an augment run is."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tpt.jobs.progress import Progress, read_fields, share_and_eta

_MAX_EXAMPLE = 160


@dataclass
class AugmentProgress(Progress):
    """What one task has done since it was started."""

    records: int = 0
    """Records written, or ready to be."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Rows of the input, or rollouts, that were rejected, by reason."""
    chunk_rejects: Counter[str] = field(default_factory=Counter)
    """Chunks that were rejected, by reason."""
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
    """Records whose thinking was truncated at the limit."""
    prompt_tokens: int = 0
    thinking_tokens: int = 0
    """Generated tokens, those of rejected thoughts included."""
    generation_s: float = 0.0
    """Seconds since the engine was ready."""
    input_bytes_answered: int = 0
    """Of the input, what this run has finished. Requests in flight do not count."""
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


def read_progress(path: Path) -> AugmentProgress | None:
    """What a task has reported last, None before it has."""
    if (fields := read_fields(path)) is None:
        return None
    counters = {
        name: Counter(value) for name, value in fields.items() if isinstance(value, dict) and name != "examples"
    }
    return AugmentProgress(**fields | counters)
