"""What a curated corpus holds: documents and tokens of every stratum, by domain and by data set, and how often training
would repeat it."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from megatron_tpt.corpus.deduplication import Pairs, sources_of
from megatron_tpt.corpus.job import Description, Shard
from megatron_tpt.corpus.report import Report, table
from megatron_tpt.corpus.verdicts import Verdicts
from megatron_tpt.markdown import inline
from megatron_tpt.records import Record
from megatron_tpt.records.where import Where

if TYPE_CHECKING:
    from megatron_tpt.corpus.curate import CurateJob

logger = logging.getLogger(__name__)

ALL = "all documents"
_COUNTS = ("documents", "tokens", "answer_tokens", "thinking_tokens")
_COUNTED = list(enumerate(_COUNTS))[1:]


class CuratedMeta(Description):
    """Makes the `meta` of the documents of a shard, and counts them by stratum."""

    def __init__(
        self,
        job: "CurateJob",
        shard: Shard,
        verdicts: Verdicts,
        found: Iterator[dict[str, Any]],
        members: Mapping[str, np.ndarray] | None,
    ) -> None:
        """`found` are data sets and annotations of the documents, `members` says which are in each stratum, bool
        [documents]; None without strata."""
        super().__init__(job.sources[shard.source].name)
        self._found = found
        self._all_strata = list(members or ())
        self._strata = _names_of_each(members) if members is not None else None
        self._counts: dict[tuple[tuple[str, ...], str, tuple[str, ...]], list[int]] = {}
        """Counts by strata, domain and data sets."""
        self._moved = _moved(job, shard, verdicts)

    def meta(self, record: Record) -> dict[str, Any]:
        """See `Description.meta`."""
        found = next(self._found)
        meta = super().meta(record) | found
        strata = next(self._strata) if self._strata is not None else ()
        group = (strata, str(meta.get("domain")), tuple(map(str, found["datasets"])))
        counts = self._counts.get(group) or self._counts.setdefault(group, [0] * len(_COUNTS))
        counts[0] += 1
        for place, name in _COUNTED:
            if name in meta:
                counts[place] += int_of(meta, name)
        return meta if self._strata is None else meta | {"strata": strata}

    def tallies(self) -> dict[str, Any]:
        """See `Description.tallies`."""
        sums: dict[str, dict[str, list[int]]] = {name: {} for name in (ALL, *self._all_strata)}
        for (strata, domain, datasets), counts in self._counts.items():
            for group in ("total", f"domain {domain}", *(f"dataset {one}" for one in datasets)):
                for name in (ALL, *strata):
                    before = sums[name].get(group, [0] * len(_COUNTS))
                    sums[name][group] = [a + b for a, b in zip(before, counts, strict=True)]
        tallies = {
            name: {group: dict(zip(_COUNTS, own[group], strict=True)) for group in sums[ALL] if group in own}
            for name, own in sums.items()
        }
        return {"strata": tallies, "moved": self._moved}


def _names_of_each(members: Mapping[str, np.ndarray]) -> Iterator[tuple[str, ...]]:
    """The strata of one document after another."""
    packed = np.packbits(np.stack([*members.values()]), axis=0)
    rows, which = np.unique(packed, axis=1, return_inverse=True)
    is_in = np.unpackbits(rows, axis=0, count=len(members)).astype(bool)
    names = [tuple(itertools.compress(members, column)) for column in is_in.T.tolist()]
    return map(names.__getitem__, which.ravel().tolist())


def int_of(meta: Mapping[str, Any], name: str) -> int:
    """A count in `meta`; 0 where there is none."""
    value = meta.get(name)
    return value if isinstance(value, int) else 0


def _moved(job: "CurateJob", shard: Shard, verdicts: Verdicts) -> Counter[str]:
    """Duplicates of a shard by the data sets of the document that is dropped and of that which is kept for it."""
    kept = np.array([kept for rows in verdicts.duplicates.values() for kept in rows.values()], np.uint64)
    if not len(kept):
        return Counter()
    if "near" in verdicts.duplicates:
        kept = Pairs(job.near_path).kept_for(kept)
    own = job.dataset_name(shard.source)
    return Counter(f"{own} -> {job.dataset_name(source)}" for source in sources_of(kept).tolist())


@dataclass(frozen=True)
class CurateReport(Report):
    """Counts as of cleaning, which add up; and for every stratum those of its documents, which may be in several."""

    datasets: dict[str, dict[str, int]] = field(default_factory=dict)
    """For each data set its rows by what became of them; they add up to `num_rows`."""
    duplicates: dict[str, int] = field(default_factory=dict)
    """Duplicates by the data sets of the document that was dropped and of that which is kept: "shq -> ldq"."""
    strata: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """For each stratum and for ALL: {"total", "domain NAME", "dataset NAME"} -> documents and tokens."""
    about: dict[str, str] = field(default_factory=dict)
    """What each stratum is for."""
    budget: float | None = None
    """Training tokens to be drawn from a stratum."""
    judging: dict[str, int] = field(default_factory=dict)
    """Documents without an answer of a judge, by judge and reason."""
    warnings: list[str] = field(default_factory=list)
    """What is probably a mistake."""

    def to_markdown(self) -> str:
        """See `Report.to_markdown`."""
        lines = [
            *self._counts(),
            *self._datasets(),
            *self._strata(),
            *self._judging(),
            *self._sets(),
            *self._examples(),
        ]
        return "\n".join(lines) + "\n"

    def _datasets(self) -> Iterator[str]:
        yield "\n## Data sets\n"
        reasons = ["kept", *self.dropped]
        rows = [[name, sum(own.values()), *(own.get(one, 0) for one in reasons)] for name, own in self.datasets.items()]
        yield from table(["", "rows", *reasons], rows)
        if self.duplicates:
            yield "\nDuplicates, by the data sets of the document that was dropped and of the one that is kept, which"
            yield "then belongs to both:\n"
            yield from table(["", "documents"], [[name, count] for name, count in self.duplicates.items()])

    def _strata(self) -> Iterator[str]:
        yield "\n## Strata\n"
        totals = {name: groups["total"] for name, groups in self.strata.items()}
        head = ["", *(name.replace("_", " ") for name in _COUNTS), "tokens each"]
        head += [f"repeated for {self.budget:,.0f} tokens"] if self.budget else []
        rows = []
        for name, total in totals.items():
            mean = f"{total['tokens'] / total['documents']:,.0f}" if total["documents"] else ""
            times = [f"{self.budget / total['tokens']:,.2f} times" if total["tokens"] else ""] if self.budget else []
            rows.append([name, *(total[count] for count in _COUNTS), mean, *times])
        yield from table(head, rows)
        for kind in ("domain", "dataset"):
            yield f"\n### Share of tokens by {kind}\n"
            yield from self._shares(kind)
        for name, text in self.about.items():
            yield f"\n- {inline(name)}: {inline(text)}"
        for warning in self.warnings:
            yield f"\n- warning: {inline(warning)}"

    def _shares(self, kind: str) -> Iterator[str]:
        """Shares of tokens, or of documents where these are not counted. A document may be in several data sets."""
        names = sorted({group for groups in self.strata.values() for group in groups if group.startswith(f"{kind} ")})
        unit = "tokens" if self.strata.get(ALL, {}).get("total", {}).get("tokens") else "documents"
        rows = [
            [stratum, *(_share(groups.get(name, {}).get(unit, 0), groups["total"][unit]) for name in names)]
            for stratum, groups in self.strata.items()
        ]
        yield from table([unit, *(name.removeprefix(f"{kind} ") for name in names)], rows)

    def _judging(self) -> Iterator[str]:
        if self.judging:
            yield "\n## Documents without an answer of a judge\n"
            yield from table(["", "documents"], [[name, count] for name, count in self.judging.items()])


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def extended_report(job: "CurateJob", report: Report) -> CurateReport:
    """The report of a job with the tallies of its shards."""
    from megatron_tpt.corpus.judging import problems

    datasets: dict[str, Counter[str]] = {name: Counter() for name in job.dataset_names}
    strata: dict[str, dict[str, Counter[str]]] = {ALL: {"total": Counter()}}
    strata |= {name: {"total": Counter()} for name in (job.strata.strata if job.strata else {})}
    wheres = {name: Where(where.text) for name, where in (job.strata.wheres if job.strata else {}).items()}
    moved, judging = Counter[str](), Counter[str]()
    for shard in job.shards():
        tally = orjson.loads(job.path("write", shard, ".json").read_bytes())
        datasets[job.dataset_name(shard.source)].update(tally["counts"])
        for name, groups in tally["strata"].items():
            for group, counts in groups.items():
                strata[name].setdefault(group, Counter()).update(counts)
        moved.update(tally["moved"])
        notes = orjson.loads(job.notes_path(shard).read_bytes()) if wheres else {}
        for name, (unseen, mismatches) in notes.items():
            wheres[name].unseen &= set(unseen)
            wheres[name].mismatches.update(mismatches)
        if job.curate_options.judges():
            judging.update(problems(job, shard))
    base = {one.name: getattr(report, one.name) for one in fields(Report)}
    about = {name: one.about for name, one in (job.strata.strata if job.strata else {}).items() if one.about}
    warnings = [*job.notes, *_warnings(strata, wheres)]
    for warning in warnings:
        logger.warning(warning)
    return CurateReport(
        **base,
        datasets={name: dict(counts) for name, counts in datasets.items()},
        duplicates=dict(sorted(moved.items())),
        strata={
            name: {group: {count: counts[count] for count in _COUNTS} for group, counts in groups.items()}
            for name, groups in strata.items()
        },
        about=about,
        budget=job.curate_options.budget,
        judging=dict(sorted(judging.items())),
        warnings=warnings,
    )


def _warnings(strata: Mapping[str, Mapping[str, Counter[str]]], wheres: Mapping[str, Where]) -> Iterator[str]:
    for name, where in wheres.items():
        yield from (f"stratum {name}: {note}" for note in where.notes())
    for name, groups in strata.items():
        if not groups["total"]["documents"]:
            yield f"stratum {name}: has no document"
