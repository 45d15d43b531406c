"""Blocks of several small files put together, so that what a call costs is not paid for every file."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from megatron_tpt.indexing.blocks import Block, End

_SMALL_BYTES = 64 << 10
_MAX_BYTES = 256 << 10
_MAX_ITEMS = 512


def grouped(blocks: Iterable[Block | End]) -> Iterator[list[Block | End]]:
    """The same in groups: a large block, or rows of a table, alone; small blocks of lines by the hundred."""
    group: list[Block | End] = []
    size = 0
    for block in blocks:
        if isinstance(block, Block) and not (isinstance(block.rows, bytes) and len(block.rows) <= _SMALL_BYTES):
            if group:
                yield group
            yield [block]
            group, size = [], 0
            continue
        group.append(block)
        size += len(block.rows) if isinstance(block, Block) and isinstance(block.rows, bytes) else 0
        if size >= _MAX_BYTES or len(group) >= _MAX_ITEMS:
            yield group
            group, size = [], 0
    if group:
        yield group


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
