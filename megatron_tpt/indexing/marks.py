"""Which tokens are thinking: what stands between the think tags, tags included."""

import numpy as np


def mark_thinking(tokens: np.ndarray, opening: list[int], closing: list[int], eos_id: int) -> np.ndarray:
    """True for every token between the think tags, tags included.

    tokens [n] must begin outside of thinking. A document's end (EOS) ends an open thought too. Returns bool [n].
    """
    # Position i of `event` says what begins at token i: 1 thinking, 2 the document; the last event counts.
    event = np.zeros(len(tokens) + 1, dtype=np.int8)
    event[np.flatnonzero(tokens == eos_id) + 1] = 2
    event[_find(tokens, closing) + len(closing)] = 2
    event[_find(tokens, opening)] = 1
    last_event = np.maximum.accumulate(np.where(event > 0, np.arange(len(event)), 0))
    return event[last_event][:-1] == 1


def _find(tokens: np.ndarray, pattern: list[int]) -> np.ndarray:
    """Positions in tokens [n] at which `pattern` begins."""
    num_places = len(tokens) - len(pattern) + 1
    if num_places <= 0:
        return np.zeros(0, dtype=np.int64)
    found = np.ones(num_places, dtype=bool)
    for offset, token in enumerate(pattern):
        found &= tokens[offset : offset + num_places] == token
    return np.flatnonzero(found)
