"""Strata: parts of a corpus by what is in the `meta` of its documents.

    ldq: {where: "'ldq' in datasets"}
    alf: {of: ldq, where: answer_tokens > 4096}
    shq: {where: "'shq' in datasets"}
    lmq: {any_of: [ldq, shq]}
    ldq_as_shq: {of: ldq, size_of: shq}

A stratum is a YAML mapping of a name to its conditions, and may be in terms of those above it. One with a size takes
the documents whose texts have the lowest hashes: a random choice that depends on nothing but the text and the seed, so
that a smaller size is part of a larger one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_tpt.config.convert import from_yaml
from megatron_tpt.config.fields import PositiveInt, check_bounds
from megatron_tpt.config.yaml_file import load_yaml
from megatron_tpt.errors import UserError, require
from megatron_tpt.records.where import Where

DEFINITIONS = Path(__file__).parent / "definitions"
_MAX_STRATA = 63
_BIN_BITS = 16

Unit = Literal["tokens", "documents"]


@dataclass(frozen=True)
class Stratum:
    """The conditions of one stratum; a document must meet all that are given."""

    where: str | None = None
    """A condition on `meta`, see `megatron_tpt.records.where`."""
    of: str | None = None
    """Only documents of this stratum."""
    any_of: list[str] = field(default_factory=list)
    """Only documents of at least one of these strata."""
    tokens: PositiveInt | None = None
    """At most this many tokens, chosen by the hash of the text."""
    documents: PositiveInt | None = None
    """At most this many documents, chosen so."""
    size_of: str | None = None
    """As many tokens as that stratum has, chosen so."""
    unit: Unit = "tokens"
    """What `size_of` counts."""
    about: str = ""
    """What it is for, for the report."""

    def __post_init__(self) -> None:
        check_bounds(self)
        require(
            self.where is not None or self.of is not None or bool(self.any_of),
            "a stratum needs where, of or any_of: say which documents it has",
        )
        sizes = [name for name in ("tokens", "documents", "size_of") if getattr(self, name) is not None]
        require(len(sizes) < 2, f"a stratum has one size: give one of {' and '.join(sizes)}")
        require(
            self.size_of is not None or self.unit == "tokens",
            f"unit: {self.unit} is what size_of counts: give both, or documents: NUMBER",
        )

    @property
    def size_unit(self) -> Unit | None:
        """What its size counts; None of a stratum without one."""
        if self.size_of is not None:
            return self.unit
        return "documents" if self.documents is not None else "tokens" if self.tokens is not None else None

    @property
    def parts(self) -> list[str]:
        """The strata that it is defined by."""
        return [name for name in (self.of, *self.any_of, self.size_of) if name is not None]


class Strata:
    """The strata of a definition file, in its order. It can be pickled."""

    def __init__(self, strata: Mapping[str, Stratum], limits: Mapping[str, int] | None = None) -> None:
        """`limits`: of strata with a size, the first hash that is no longer in them, see `find_limit`."""
        self.strata = dict(strata)
        self.limits = dict(limits or {})
        require(len(self.strata) <= _MAX_STRATA, f"{len(self.strata)} strata: at most {_MAX_STRATA} are possible")
        for number, (name, stratum) in enumerate(self.strata.items()):
            for part in stratum.parts:
                require(
                    part in list(self.strata)[:number],
                    f"{name}: {part} is not a stratum above it, of which there are {number}: correct the order",
                )
        self.wheres = {name: Where(one.where) for name, one in self.strata.items() if one.where is not None}

    @classmethod
    def read(cls, name: str | Path) -> "Strata":
        """The strata of a file, or of a definition of the package. Raises UserError with all mistakes."""
        path = DEFINITIONS / f"{name}.yaml" if str(name) in known_definitions() else Path(name)
        try:
            content, places = load_yaml(path)
        except OSError as error:
            known = ", ".join(known_definitions())
            raise UserError(
                f"--strata {name}: {error.strerror}: give a YAML file, or one of the definitions {known}"
            ) from None
        strata = from_yaml(dict[str, Stratum], content, places, path)
        if not strata:
            raise UserError(f"{path}: holds no stratum; give NAME: {{where: CONDITION}}")
        try:
            return cls(strata)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The definitions, for the settings of a job: what was not given is not there."""
        given = {name: asdict(one) for name, one in self.strata.items()}
        return {
            name: {key: value for key, value in one.items() if value and (key != "unit" or one["size_of"])}
            for name, one in given.items()
        }

    def bits(self, meta: Mapping[str, Any]) -> int:
        """Which strata's own `where` a document meets, bit i of stratum i; that of one without is set."""
        bits = 0
        for number, name in enumerate(self.strata):
            if name not in self.wheres or self.wheres[name].matches(meta):
                bits |= 1 << number
        return bits

    def members(self, bits: np.ndarray, hashes: np.ndarray) -> dict[str, np.ndarray]:
        """For each stratum, which documents are in it: bool [documents]. `bits` and `hashes` are uint64 [documents]."""
        found: dict[str, np.ndarray] = {}
        for number, (name, stratum) in enumerate(self.strata.items()):
            is_in = (bits >> np.uint64(number) & np.uint64(1)).astype(bool)
            if stratum.of is not None:
                is_in &= found[stratum.of]
            if stratum.any_of:
                is_in &= np.logical_or.reduce([found[part] for part in stratum.any_of])
            if name in self.limits:
                is_in &= hashes < np.uint64(self.limits[name])
            found[name] = is_in
        return found

    @cached_property
    def sized(self) -> list[str]:
        """The strata with a size."""
        return [name for name, stratum in self.strata.items() if stratum.size_unit]


def known_definitions() -> list[str]:
    """The names of the definitions that come with the package."""
    return sorted(path.stem for path in DEFINITIONS.glob("*.yaml"))


def with_limits(strata: Strata, shards: Callable[[], Iterable[np.ndarray]]) -> tuple[Strata, list[str]]:
    """The strata with the limits of those that have a size, and a line for each that has fewer documents than that.

    `shards()` gives bits, hashes and tokens of all documents, uint64 [3, documents], and is called often. Memory does
    not grow with the documents.
    """
    notes: list[str] = []
    for name in strata.sized:
        stratum = strata.strata[name]
        unit = stratum.size_unit or "tokens"

        def weighted(own: str, unit: Unit = unit, strata: Strata = strata) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for bits, hashes, tokens in shards():
                is_in = strata.members(bits, hashes)[own]
                yield hashes[is_in], tokens[is_in] if unit == "tokens" else np.ones(is_in.sum(), np.uint64)

        wanted = int(stratum.tokens or stratum.documents or 0)
        if stratum.size_of is not None:
            wanted = sum(int(sizes.sum()) for _, sizes in weighted(stratum.size_of))
        if unit == "tokens" and not any(tokens.any() for _, _, tokens in shards()):
            raise UserError(
                f"the stratum {name} has its size in tokens, and no document has them in its meta: give --annotate "
                "lengths and --tokenizer, or another --strata"
            )
        limit, available = find_limit(partial(weighted, name), wanted)
        if limit is not None:
            strata = Strata(strata.strata, strata.limits | {name: limit})
        elif available < wanted:
            notes.append(f"stratum {name}: has only {available:,} of the {wanted:,} {unit} of its size; all are in it")
    return strata, notes


def find_limit(parts: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]], wanted: int) -> tuple[int | None, int]:
    """The limit below which the hashes of documents have sizes that sum to at most `wanted`, the highest such limit;
    None where all together do. And the sum of all sizes.

    `parts()` gives hashes and sizes, uint64 [documents] each. A radix search: each of four passes counts the sizes by
    the next 16 bits of the hashes that begin as the limit does.
    """
    prefix = taken = total = 0
    for shift in range(64 - _BIN_BITS, -1, -_BIN_BITS):
        sums = np.zeros(1 << _BIN_BITS)  # exact below 2^53
        for hashes, sizes in parts():
            if shift + _BIN_BITS < 64:
                begins_so = hashes >> np.uint64(shift + _BIN_BITS) == np.uint64(prefix)
                hashes, sizes = hashes[begins_so], sizes[begins_so]
            bins = (hashes >> np.uint64(shift) & np.uint64((1 << _BIN_BITS) - 1)).astype(np.int64)
            sums += np.bincount(bins, weights=sizes.astype(np.float64), minlength=1 << _BIN_BITS)
        ends = taken + np.cumsum(sums)
        if shift + _BIN_BITS == 64:
            total = int(ends[-1])
            if total <= wanted:
                return None, total
        place = int(np.searchsorted(ends, wanted, side="right"))
        taken = int(ends[place - 1]) if place else taken
        prefix = prefix << _BIN_BITS | place
    return prefix, total
