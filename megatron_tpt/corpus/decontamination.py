"""Finding documents that overlap with evaluation sets.

Overlap is a run of `ngram` words (13 by default, as in GPT-3, arXiv 2005.14165, appendix C) that a document and an item
of an evaluation set share; `min_matches` different ones are asked for. An item that is too short to have so many is
looked for as one run. Runs of fewer than 8 words, the lower bound in that appendix, turn up everywhere by chance: an
item as short as that matches only a document that consists of exactly its words.

datatrove's n-gram filter is not used: its index is made with lighteval, it needs spaCy to split English into words, and
it knows neither short items nor a minimum of matches.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_tpt.corpus.options import EvaluationSet
from megatron_tpt.corpus.words import ngram_hashes, split_words
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write
from megatron_tpt.records import read_records

SHORTEST_RUN = 8
_FILTER_BITS = 22


@dataclass(frozen=True)
class Contamination:
    """Why a document is contaminated."""

    matches: dict[str, int]
    """Different runs of words shared with each evaluation set that has enough of them, by name."""
    evaluation_set: str
    """The first of those sets, by the order of the options."""
    item: int
    """The item of that set with the first shared run, counted from 1."""
    ngram: str
    """That run, in lower case and without punctuation."""

    to_dict = asdict


class _Runs:
    """All runs of one length: one row per hash and evaluation set."""

    def __init__(self, hashes: np.ndarray, sets: np.ndarray, items: np.ndarray, are_whole: np.ndarray) -> None:
        """For each run uint64 [runs]: its hash, the number of its set, of its item, and whether it is all of that."""
        order = np.lexsort((items, sets, hashes))
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = (np.diff(hashes[order]) != 0) | (np.diff(sets[order]) != 0)
        rows = order[is_first]
        self._hashes, self.sets, self.items, self.are_whole = hashes[rows], sets[rows], items[rows], are_whole[rows]
        self._present = np.zeros(1 << _FILTER_BITS, dtype=bool)  # most runs of most documents end here
        self._present[self._filter_index(self._hashes)] = True

    @staticmethod
    def _filter_index(hashes: np.ndarray) -> np.ndarray:
        return hashes >> np.uint64(64 - _FILTER_BITS)

    def find(self, hashes: np.ndarray) -> list[tuple[int, int]]:
        """(Position in `hashes`, row of this table) for every hash that is here, in order."""
        candidates = np.flatnonzero(self._present[self._filter_index(hashes)])
        begins = np.searchsorted(self._hashes, hashes[candidates], side="left").tolist()
        ends = np.searchsorted(self._hashes, hashes[candidates], side="right").tolist()
        found = zip(candidates.tolist(), begins, ends, strict=True)
        return [(position, row) for position, begin, end in found for row in range(begin, end)]


class EvaluationIndex:
    """The runs of words of all evaluation sets."""

    def __init__(self, num_items: dict[str, int], ngram: int, min_matches: int, table: np.ndarray) -> None:
        """`num_items` by name of the set. `table` is uint64 [5, runs]: length in words, hash, number of the set, number
        of the item, whether the run is looked for because it is all of the item.
        """
        self.num_items = num_items
        self.ngram = ngram
        self.min_matches = min_matches
        self._names = list(num_items)
        self._table = table
        self._shortest = min(SHORTEST_RUN, ngram)
        self._runs = {length: _Runs(*table[1:, table[0] == length]) for length in np.unique(table[0]).tolist()}

    @classmethod
    def build(cls, sets: Iterable[EvaluationSet], ngram: int, min_matches: int) -> "EvaluationIndex":
        """Read the evaluation sets. Raises UserError for one that is unreadable or has no items."""
        num_items: dict[str, int] = {}
        parts = [np.empty((5, 0), np.uint64)]
        for number, evaluation_set in enumerate(sets):
            item = -1
            for item, record in enumerate(read_records([evaluation_set.path], text_column=evaluation_set.columns)):
                parts.append(_item_runs(split_words(record.text), number, item, ngram, min_matches))
            num_items[evaluation_set.name] = item + 1
            if item < 0:
                raise UserError(f"{evaluation_set.path}: holds no items of the evaluation set {evaluation_set.name}")
        return cls(num_items, ngram, min_matches, np.concatenate(parts, axis=1))

    def save(self, path: Path) -> None:
        """Write the index to a file that `load` reads."""
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            numbers = np.array([self.ngram, self.min_matches, *self.num_items.values()])
            np.savez(file, names=np.array(self._names, dtype=str), numbers=numbers, table=self._table)

    @classmethod
    def load(cls, path: Path) -> "EvaluationIndex":
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            ngram, min_matches, *num_items = arrays["numbers"].tolist()
            return cls(dict(zip(arrays["names"].tolist(), num_items, strict=True)), ngram, min_matches, arrays["table"])

    def describe(self) -> dict[str, dict[str, int]]:
        """For each evaluation set: its items, and how many of them are looked for in which way."""
        lengths, _, sets, items, are_whole = self._table
        are_short = lengths < self._shortest
        described = {}
        for number, (name, num_items) in enumerate(self.num_items.items()):
            described[name] = {"items": num_items} | {
                way: len(np.unique(items[(sets == number) & which]))
                for way, which in (
                    ("by_ngrams", are_whole == 0),
                    ("as_one_run", (are_whole == 1) & ~are_short),
                    ("as_whole_document", are_short),
                )
            }
        return described

    def find(self, text: str) -> Contamination | None:
        """How `text` overlaps with the evaluation sets, if enough."""
        words = split_words(text)
        matches: Counter[int] = Counter()
        first: dict[int, tuple[int, int, int]] = {}
        for length, hashes in ngram_hashes(words, sorted(self._runs)):
            if length < self._shortest and length != len(words):
                continue
            runs = self._runs[length]
            seen: set[int] = set()
            for position, row in runs.find(hashes):
                if row not in seen:
                    seen.add(row)
                    number = int(runs.sets[row])
                    matches[number] += self.min_matches if runs.are_whole[row] else 1
                    first.setdefault(number, (int(runs.items[row]), position, length))
        enough = {number: count for number, count in sorted(matches.items()) if count >= self.min_matches}
        if not enough:
            return None
        number = next(iter(enough))
        item, position, length = first[number]
        ngram = b" ".join(words[position : position + length]).decode()
        names = {self._names[number]: count for number, count in enough.items()}
        return Contamination(names, self._names[number], item + 1, ngram)


def _item_runs(words: list[bytes], number: int, item: int, ngram: int, min_matches: int) -> np.ndarray:
    """The rows of the index for one item of evaluation set `number`: uint64 [5, runs]."""
    is_whole = len(words) < ngram + min_matches - 1
    length = len(words) if is_whole else ngram
    if not words:
        return np.empty((5, 0), np.uint64)
    _, hashes = next(ngram_hashes(words, [length]))
    return np.stack(
        [np.full_like(hashes, length), hashes, *(np.full_like(hashes, v) for v in (number, item, is_whole))]
    )
