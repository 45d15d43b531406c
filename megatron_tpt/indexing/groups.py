"""Blocks of several small files put together, so that the cost of a call is not paid for every file."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from megatron_tpt.indexing.blocks import Block, End

_SMALL_BYTES = 64 << 10
_MAX_BYTES = 256 << 10
_MAX_ITEMS = 512


def grouped(blocks: Iterable[Block | End]) -> Iterator[list[Block | End]]:
    """The same in groups: a large block, or rows of a table, alone; small blocks of lines by the hundred.

    What came before an error of `blocks` is handed out before it is raised.
    """
    group: list[Block | End] = []
    size = 0.0
    error: Exception | None = None
    blocks = iter(blocks)
    while True:
        try:
            block = next(blocks, None)
        except Exception as caught:
            block, error = None, caught
        is_small = isinstance(block, End) or (block is not None and _num_bytes(block) <= _SMALL_BYTES)
        if group and (not is_small or size >= _MAX_BYTES or len(group) >= _MAX_ITEMS):
            yield group
            group, size = [], 0.0
        if error is not None:
            raise error
        if block is None:
            return
        if not is_small:
            yield [block]
            continue
        group.append(block)
        size += 0 if isinstance(block, End) else _num_bytes(block)


def _num_bytes(block: Block) -> float:
    """Size of lines; tables and single lines that are too large are not put together with others."""
    return len(block.rows) if isinstance(block.rows, bytes) else math.inf


class Joined(NamedTuple):
    """The lines of several blocks."""

    rows: bytes
    num_rows: list[int]
    """Of each block."""


def join_blocks(group: Sequence[Block | End]) -> Joined | None:
    """The lines of a group of several blocks; None where there is one."""
    parts = [block.rows for block in group if isinstance(block, Block) and isinstance(block.rows, bytes)]
    if len(parts) < 2:
        return None
    parts = [part if part.endswith(b"\n") else part + b"\n" for part in parts]
    return Joined(b"".join(parts), [part.count(b"\n") for part in parts])
