"""The verdict on each row, by what the stages before found, and the counts."""

from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import orjson

from megatron_tpt.corpus.deduplication import Pairs, document_number, document_place
from megatron_tpt.corpus.job import PrepareJob, Shard
from megatron_tpt.records import Row

EXAMPLES_PER_REASON = 3
_SNIPPET_LENGTH = 300


class Verdicts:
    """What the stages before found about the documents of a shard."""

    def __init__(self, job: PrepareJob, shard: Shard, stages: Sequence[str]) -> None:
        """`stages`: of "exact" and "near", those whose findings count."""
        scanned = orjson.loads(job.path("scan", shard, ".json").read_bytes())
        self.num_rows: int = scanned["rows"]
        self.num_bad = sum(scanned["problems"].values())
        self.contaminated = {int(row): evidence for row, evidence in scanned["contaminated"].items()}
        self.duplicates = {stage: self._pairs(job, shard, stage) for stage in stages}
        self._dropped = set(self.contaminated).union(*self.duplicates.values())

    @staticmethod
    def _pairs(job: PrepareJob, shard: Shard, stage: str) -> dict[int, int]:
        """Row -> number of the document that is kept."""
        rows = job.options.rows_per_shard
        begin = document_number(shard.source, shard.number * rows)
        files = [job.near_path] if stage == "near" else job.pair_files(stage)
        found: dict[int, int] = {}
        for path in files:
            found |= Pairs(path).between(begin, begin + rows)
        return {document_place(document)[1]: kept for document, kept in found.items()}

    def drops(self, row: int) -> bool:
        """Whether the row of that number, which holds a record, is dropped."""
        return row in self._dropped

    @property
    def num_kept(self) -> int:
        """How many documents of the shard stay."""
        return self.num_rows - self.num_bad - len(self.contaminated) - sum(map(len, self.duplicates.values()))


REASONS = {"exact": "duplicate", "near": "near_duplicate"}
"""Reason code of a duplicate by the stage that found it."""


class ShardTally:
    """The results of the rows of one shard: the counts and examples for the report, and the lines of the rejects."""

    def __init__(self, job: PrepareJob, shard: Shard, verdicts: Verdicts) -> None:
        self.counts: Counter[str] = Counter()
        self.contaminated_by: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self._source = job.sources[shard.source].name
        self._verdicts = verdicts
        self._kept = _kept_documents(job, verdicts)

    def reject(self, row: Row) -> dict[str, Any] | None:
        """The line of the rejects for `row`, None for a row that is kept. Counts it."""
        reason, evidence = self._judge(row)
        self.counts[reason or "kept"] += 1
        if reason is None:
            return None
        line = {
            "id": row.record.id if row.record else None,
            "source": self._source,
            "row": row.number + 1,
            "reason": reason,
            "evidence": evidence,
            # The text of an exact duplicate is that of the kept document.
            "text": row.record.text if row.record and reason != "duplicate" else None,
        }
        self.contaminated_by.update(evidence.get("matches", {}).keys())
        group = f"{reason}: {evidence['evaluation_set']}" if reason == "contaminated" else reason
        examples = self.examples.setdefault(group, [])
        if len(examples) < EXAMPLES_PER_REASON:
            text = row.record.text[:_SNIPPET_LENGTH] if row.record else None
            examples.append(line | {"text": text})
        return line

    def _judge(self, row: Row) -> tuple[str | None, dict[str, Any]]:
        """Reason code and evidence."""
        if row.record is None:
            return f"bad record: {row.problem}", {"detail": row.detail}
        if row.number in self._verdicts.contaminated:
            return "contaminated", self._verdicts.contaminated[row.number]
        for stage, rows in self._verdicts.duplicates.items():
            if row.number in rows:
                return REASONS[stage], {"kept": self._kept[rows[row.number]]}
        return None, {}


def _kept_documents(job: PrepareJob, verdicts: Verdicts) -> dict[int, dict[str, Any]]:
    """For each document that the verdicts name as kept: its id, source and row (from 1).

    The first of several equal documents may be a near-duplicate of another: then that one is kept for all of them.
    """
    near = Pairs(job.near_path) if "near" in verdicts.duplicates else None
    documents = sorted({kept for rows in verdicts.duplicates.values() for kept in rows.values()})
    places = {document: document_place(near.kept(document) if near else document) for document in documents}
    rows_per_shard = job.options.rows_per_shard
    described: dict[int, dict[str, Any]] = {}
    shard, ids = None, np.empty(0, dtype=bytes)
    for document, (source, row) in sorted(places.items(), key=itemgetter(1)):
        if shard != (shard := Shard(source, row // rows_per_shard)):
            ids = np.load(job.path("scan", shard, ".ids.npy"), mmap_mode="r", allow_pickle=False)
        name = ids[row % rows_per_shard].decode()
        described[document] = {"id": name, "source": job.sources[source].name, "row": row + 1}
    return described
