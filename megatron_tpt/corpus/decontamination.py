"""Finding documents that overlap with evaluation sets.

Overlap is a run of `ngram` words (13 by default, as in GPT-3, arXiv 2005.14165, appendix C) that a document and an item
of an evaluation set share; `min_matches` different ones are required. An item that is too short to have that
many is searched for as one run. Runs of fewer than 8 words, the lower bound in that appendix, occur everywhere by
chance: an item as short as that matches only a document that consists of exactly its words.

datatrove's n-gram filter is not used: its index is made with lighteval, it needs spaCy to split English into words, and
it knows neither short items nor a minimum of matches.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_tpt.corpus.evaluation_sets import read_items, warn_of_empty_items
from megatron_tpt.corpus.options import EvaluationSet
from megatron_tpt.corpus.words import ngram_hashes, split_words, text_chunks
from megatron_tpt.files import atomic_write

SHORTEST_RUN = 8
_FILTER_BITS = 22
_SHOWN_PLACES = 3
_WORDS_AT_A_TIME = 1 << 16


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
    items: dict[str, list[int]] = field(default_factory=dict, compare=False)
    """The items of those sets with a run in the document, counted from 1. Of equal items, the first."""

    def to_dict(self) -> dict[str, Any]:
        """The evidence, without all items."""
        return {name: value for name, value in asdict(self).items() if name != "items"}


class _Runs:
    """All runs of one length: one row per hash and evaluation set."""

    def __init__(self, hashes: np.ndarray, sets: np.ndarray, items: np.ndarray, are_whole: np.ndarray) -> None:
        """For each run uint64 [runs]: its hash, the number of its set, of its item, and whether it is all of that."""
        order = np.lexsort((items, sets, hashes))
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = (np.diff(hashes[order]) != 0) | (np.diff(sets[order]) != 0)
        rows = order[is_first]
        self._hashes, self.sets, self.items, self.are_whole = hashes[rows], sets[rows], items[rows], are_whole[rows]
        self._present = np.zeros(1 << _FILTER_BITS, dtype=bool)  # rules out most runs of most documents
        self._present[self._filter_index(self._hashes)] = True

    @staticmethod
    def _filter_index(hashes: np.ndarray) -> np.ndarray:
        return hashes >> np.uint64(64 - _FILTER_BITS)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position in `hashes` and row of this table, for every hash that is here: int64 [found], in order."""
        candidates = np.flatnonzero(self._present[self._filter_index(hashes)])
        begins = np.searchsorted(self._hashes, hashes[candidates], side="left")
        num_rows = np.searchsorted(self._hashes, hashes[candidates], side="right") - begins
        nth_row = np.arange(num_rows.sum()) - np.repeat(num_rows.cumsum() - num_rows, num_rows)
        return np.repeat(candidates, num_rows), np.repeat(begins, num_rows) + nth_row


class EvaluationIndex:
    """The runs of words of all evaluation sets."""

    def __init__(self, num_items: dict[str, int], ngram: int, min_matches: int, table: np.ndarray) -> None:
        """`num_items` by name of the set. `table` is uint64 [5, runs]: length in words, hash, number of the set, number
        of the item, whether the run is searched for because it is all of the item.
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
        """Read the evaluation sets, and say which items have no words. Raises UserError for one that is unreadable or
        has no items to look for.
        """
        num_items: dict[str, int] = {}
        parts = [np.empty((5, 0), np.uint64)]
        for number, evaluation_set in enumerate(sets):
            item, num_empty = -1, 0
            empty: list[str] = []
            for item, (place, text) in enumerate(read_items(evaluation_set)):
                words = split_words(text)
                parts.append(_item_runs(words, number, item, ngram, min_matches))
                if not words:
                    num_empty += 1
                    empty = [*empty, place][:_SHOWN_PLACES]
            num_items[evaluation_set.name] = item + 1
            warn_of_empty_items(evaluation_set, item + 1, empty, num_empty)
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
        """For each evaluation set: its items, and how many of them are searched for in which way."""
        lengths, _, sets, items, are_whole = self._table
        are_short = lengths < self._shortest
        described: dict[str, dict[str, int]] = {}
        for number, (name, num_items) in enumerate(self.num_items.items()):
            ways = {
                way: len(np.unique(items[(sets == number) & which]))
                for way, which in (
                    ("by_ngrams", are_whole == 0),
                    ("as_one_run", (are_whole == 1) & ~are_short),
                    ("as_whole_document", are_short),
                )
            }
            described[name] = {"items": num_items, **ways, "without_words": num_items - sum(ways.values())}
        return described

    def find(self, texts: Sequence[str]) -> list[Contamination | None]:
        """For each of `texts`, how it overlaps with the evaluation sets, if enough. Many at once cost less each.

        Memory does not grow with the texts.
        """
        hits: list[dict[tuple[int, int], _Hit]] = [{} for _ in texts]
        for windows in _batches(self._windows(texts)):
            for document, hit in self._hits(windows):
                hits[document].setdefault((hit.length, hit.row), hit)
        return [self._judge([*found.values()]) if found else None for found in hits]

    def _windows(self, texts: Sequence[str]) -> Iterator["_Window"]:
        """The words of `texts`, those of a long one in windows that overlap, so that each of its runs is in one."""
        overlap = max([self._shortest, *self._runs]) - 1
        for document, text in enumerate(texts):
            words: list[bytes] = []
            first = 0
            num_left = len(text)
            for chunk in text_chunks(text):
                words = words + split_words(chunk)
                num_left -= len(chunk)
                yield _Window(document, first, words, first == 0 and num_left == 0)
                num_done = max(len(words) - overlap, 0)
                words, first = words[num_done:], first + num_done

    def _hits(self, windows: Sequence["_Window"]) -> Iterator[tuple[int, "_Hit"]]:
        """What is found in windows, by document."""
        num_words = np.array([len(window.words) for window in windows])
        is_whole = np.array([window.is_whole for window in windows])
        ends = num_words.cumsum()
        words = list(itertools.chain.from_iterable(window.words for window in windows))
        for length, hashes in ngram_hashes(words, sorted(self._runs)):
            runs = self._runs[length]
            positions, rows = runs.find(hashes)
            found_in = np.searchsorted(ends, positions, side="right")
            is_within = positions + length <= ends[found_in]
            if length < self._shortest:
                is_within &= is_whole[found_in] & (num_words[found_in] == length)
            found = np.stack([found_in, positions, rows])[:, is_within]
            _, first_of_each = np.unique(found[[0, 2]], axis=1, return_index=True)
            for number, position, row in found[:, first_of_each].T.tolist():
                window = windows[number]
                place = window.first + position - int(ends[number] - num_words[number])
                ngram = words[position : position + length]
                hit = _Hit(
                    length, row, place, int(runs.sets[row]), int(runs.items[row]), bool(runs.are_whole[row]), ngram
                )
                yield window.document, hit

    def _judge(self, hits: list["_Hit"]) -> Contamination | None:
        """Whether the different runs that were found in a document are enough."""
        matches: Counter[int] = Counter()
        for hit in hits:
            matches[hit.set] += self.min_matches if hit.is_whole else 1
        enough = {number: count for number, count in sorted(matches.items()) if count >= self.min_matches}
        if not enough:
            return None
        first = min((hit for hit in hits if hit.set == min(enough)), key=lambda hit: (hit.length, hit.position))
        names = {self._names[number]: count for number, count in enough.items()}
        items = {self._names[number]: sorted({hit.item + 1 for hit in hits if hit.set == number}) for number in enough}
        return Contamination(names, self._names[first.set], first.item + 1, b" ".join(first.words).decode(), items)


class _Window(NamedTuple):
    """Words that follow each other in a document."""

    document: int
    first: int
    """Place of the first word in the document."""
    words: list[bytes]
    is_whole: bool
    """Whether these are all words of the document."""


class _Hit(NamedTuple):
    """A run of words of a document that is also in an evaluation set."""

    length: int
    row: int
    """In the table of runs of this length: equal for equal runs."""
    position: int
    set: int
    item: int
    is_whole: bool
    words: list[bytes]


def _batches(windows: Iterable[_Window]) -> Iterator[list[_Window]]:
    """Windows, as many at once as have some ten thousand words."""
    batch: list[_Window] = []
    num_words = 0
    for window in windows:
        batch.append(window)
        num_words += len(window.words)
        if num_words >= _WORDS_AT_A_TIME:
            yield batch
            batch, num_words = [], 0
    if batch:
        yield batch


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
