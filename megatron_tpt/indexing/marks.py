"""Which tokens are thinking: those between the think tags, tags included."""

from collections.abc import Callable

import numpy as np

_FIRST_CHUNK, _LARGEST_CHUNK = 1 << 12, 1 << 18


def mark_thinking(
    tokens: np.ndarray, opening: list[int], closing: list[int], eos_id: int, *, starts_inside: bool = False
) -> np.ndarray:
    """True for every token between the think tags, tags included.

    tokens [n] begin outside of thinking, or within it. A document's end (EOS) ends an open thought too. Returns bool
    [n].
    """
    places, begins = _changes(tokens, opening, closing, eos_id)
    lengths = np.diff(places, prepend=0, append=len(tokens))
    return np.repeat(np.concatenate([[starts_inside], begins]), lengths)


def begin_of_marking(
    read: Callable[[int, int], np.ndarray], end: int, opening: list[int], closing: list[int], eos_id: int
) -> tuple[int, bool]:
    """From where a document has to be read to mark its tokens from `end` on, and whether it is thinking there.

    `read(first, last + 1)` gives tokens of the document. They are searched backwards from `end`, no farther than to the
    last tag or EOS.
    """
    longest = max(len(opening), len(closing)) - 1  # of a tag that `end` cuts
    high, size = end, _FIRST_CHUNK
    while high > 0:
        low = max(0, high - size)
        places, begins = _changes(read(low, min(end, high + longest)), opening, closing, eos_id)
        if len(places):
            return max(low + int(places[-1]), end - longest), bool(begins[-1])
        high, size = low, min(2 * size, _LARGEST_CHUNK)
    return max(0, end - longest), False


def _changes(tokens: np.ndarray, opening: list[int], closing: list[int], eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The places in tokens [n] at which thinking begins or ends, in order, and whether it begins there."""
    ends = [find(tokens, [eos_id]) + 1, find(tokens, closing) + len(closing)]
    parts = [*ends, find(tokens, opening)]
    places = np.concatenate(parts)
    order = np.argsort(places, kind="stable")  # a tag that opens where another closes comes after it
    return places[order], np.repeat([False, False, True], [len(part) for part in parts])[order]


def find(tokens: np.ndarray, pattern: list[int]) -> np.ndarray:
    """Positions in tokens [n] at which `pattern` begins, in order."""
    num_places = max(0, len(tokens) - len(pattern) + 1)
    found = tokens[:num_places] == pattern[0]
    for offset, token in enumerate(pattern[1:], start=1):
        if found.any():
            found &= tokens[offset : offset + num_places] == token
    return np.flatnonzero(found) if found.any() else np.zeros(0, np.int64)  # any takes a tenth of the time
