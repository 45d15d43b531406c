"""Running statistics of augmented records: counts, and the lengths of documents and thoughts.

They are sums and histograms, so they merge: every shard keeps its own as JSON, the whole is their sum in any order.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

from megatron_tpt.records import Record

# Neighbouring buckets lie 2 % apart, so that a percentile read from them is within 1 % of a value that was seen.
_LOG_GROWTH = math.log(1.02)
_ZERO = -1
_NORMAL_95 = 1.96


def _bucket(value: int) -> int:
    return math.floor(math.log(value) / _LOG_GROWTH) if value else _ZERO


def _bucket_value(bucket: int) -> float:
    return math.exp((bucket + 0.5) * _LOG_GROWTH) if bucket != _ZERO else 0.0


@dataclass
class LengthStatistics:
    """Lengths in tokens: exact count, mean and standard deviation, and percentiles within 1 %."""

    count: int = 0
    total: int = 0
    total_of_squares: int = 0
    smallest: int | None = None
    largest: int | None = None
    histogram: Counter[int] = field(default_factory=Counter)
    """Lengths by the logarithm of their size; 0 has the bucket -1."""

    def add(self, length: int) -> None:
        """Count one length of 0 or more."""
        self._take(1, length, length * length, length, length, {_bucket(length): 1})

    def merge(self, other: "LengthStatistics") -> None:
        """Count all that `other` has counted."""
        if other.smallest is not None and other.largest is not None:
            self._take(other.count, other.total, other.total_of_squares, other.smallest, other.largest, other.histogram)

    def _take(
        self, count: int, total: int, squares: int, smallest: int, largest: int, histogram: dict[int, int]
    ) -> None:
        self.count += count
        self.total += total
        self.total_of_squares += squares
        self.smallest = smallest if self.smallest is None else min(self.smallest, smallest)
        self.largest = largest if self.largest is None else max(self.largest, largest)
        self.histogram.update(histogram)

    @property
    def mean(self) -> float:
        """Mean length; nan without a length."""
        return self.total / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        """Standard deviation of the sample (n - 1 in the denominator); nan below two lengths."""
        if self.count < 2:
            return math.nan
        # Whole numbers up to the last division: nothing cancels.
        return math.sqrt((self.count * self.total_of_squares - self.total**2) / (self.count * (self.count - 1)))

    @property
    def half_interval(self) -> float:
        """Half the 95 % interval of the mean in the normal approximation; nan below two lengths."""
        return _NORMAL_95 * self.std / math.sqrt(self.count) if self.count else math.nan

    def percentile(self, percent: float) -> float:
        """The length below or at which `percent` of all lie, within 1 %; nan without a length."""
        if self.smallest is None or self.largest is None:
            return math.nan
        rank = max(1, math.ceil(percent / 100 * self.count))
        seen = 0
        for bucket in sorted(self.histogram):
            seen += self.histogram[bucket]
            if seen >= rank:
                break
        return min(max(_bucket_value(bucket), self.smallest), self.largest)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return vars(self) | {"histogram": {str(bucket): self.histogram[bucket] for bucket in sorted(self.histogram)}}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**content | {"histogram": Counter({int(k): n for k, n in content["histogram"].items()})})


@dataclass
class ThinkingStatistics:
    """The results of the documents of a shard, or of several."""

    records: int = 0
    """Records written."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Records whose thinking was rejected, by reason."""
    chunk_rejects: Counter[str] = field(default_factory=Counter)
    """Chunks whose thinking was rejected, by reason; of records and of rejected ones."""
    truncated: int = 0
    """Written records whose thinking was truncated at the limit of new tokens."""
    prompt_tokens: int = 0
    """Tokens the generator read for the written records, where `meta.prompt_tokens` says so."""
    document_tokens: LengthStatistics = field(default_factory=LengthStatistics)
    """Lengths of the written records' documents."""
    thinking_tokens: LengthStatistics = field(default_factory=LengthStatistics)
    """Lengths of the written records' thoughts."""
    generator_s: float = 0.0
    """Seconds between the end of these records and of those before them, times the devices of the generator: the sum
    over shards is the generator's time, except for what killed runs had not finished."""

    def add_record(self, record: Record) -> None:
        """Count a written record by its `meta`: document_tokens, thinking_tokens, truncated, prompt_tokens."""
        meta = record.meta
        self.records += 1
        self.truncated += bool(meta.get("truncated"))
        self.prompt_tokens += meta.get("prompt_tokens") or 0
        for lengths, name in ((self.document_tokens, "document_tokens"), (self.thinking_tokens, "thinking_tokens")):
            if (length := meta.get(name)) is not None:
                lengths.add(max(length, 0))  # earlier versions wrote -1 where a server reported no lengths

    def merge(self, other: "ThinkingStatistics") -> None:
        """Count all that `other` has counted."""
        self.records += other.records
        self.rejects.update(other.rejects)
        self.chunk_rejects.update(other.chunk_rejects)
        self.truncated += other.truncated
        self.prompt_tokens += other.prompt_tokens
        self.document_tokens.merge(other.document_tokens)
        self.thinking_tokens.merge(other.thinking_tokens)
        self.generator_s += other.generator_s

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for `json.dumps`."""
        return vars(self) | {
            "rejects": dict(sorted(self.rejects.items())),
            "chunk_rejects": dict(sorted(self.chunk_rejects.items())),
            "document_tokens": self.document_tokens.to_json(),
            "thinking_tokens": self.thinking_tokens.to_json(),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(
            **content
            | {
                "rejects": Counter(content["rejects"]),
                "chunk_rejects": Counter(content.get("chunk_rejects", {})),
                "document_tokens": LengthStatistics.from_json(content["document_tokens"]),
                "thinking_tokens": LengthStatistics.from_json(content["thinking_tokens"]),
            }
        )
