"""A source in blocks of some size that other threads can parse: stretches of lines, or batches of a table's rows."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_tpt.errors import UserError
from megatron_tpt.files import file_checksum
from megatron_tpt.indexing.pieces import Rows, TooLarge
from megatron_tpt.records import Columns, Source
from megatron_tpt.records.formats import file_format
from megatron_tpt.records.limits import max_record_bytes
from megatron_tpt.records.lines import read_chunks
from megatron_tpt.records.reading import table_pieces
from megatron_tpt.records.record import DamagedSource
from megatron_tpt.records.tables import record_columns

if TYPE_CHECKING:
    import pyarrow

_READ_BYTES = 1 << 20


class Block(NamedTuple):
    """Some rows of a source, in order."""

    rows: Rows
    """Whole lines, or rows of a table; a line that is longer than a record may be is alone, as its size."""


class End(NamedTuple):
    """The end of a source."""

    damage: str | None
    """Why the source cannot be read any further, None where it was read to its end."""
    checksum: str
    """Of the file as it was read; empty for what is no file."""


def read_source(source: Source, columns: Columns, block_bytes: int) -> Iterator[Block | End]:
    """The blocks of a source, each of about `block_bytes`, and its `End`.

    Raises UserError for a source that cannot be opened or has no text column, or whose storage fails.
    """
    hashing = _InlineHash() if _is_plain(source) else _HashBeside(source.path)
    damage = None
    with closing(hashing):
        try:
            if source.path is None or _is_table(source.path):
                yield from _table_blocks(source, columns, block_bytes)
            else:
                chunks = hashing.read(source.path) if isinstance(hashing, _InlineHash) else _unpacked(source.path)
                yield from _line_blocks(chunks, block_bytes)
        except DamagedSource as error:
            damage = str(error)
        yield End(damage, hashing.checksum())


def _is_plain(source: Source) -> bool:
    format = file_format(source.path) if source.path else None
    return format is not None and format.has_plain_lines


def _is_table(path: Path) -> bool:
    format = file_format(path)
    return format is not None and format.is_table


class _InlineHash:
    """Hashes a file while it is read: it need not fit into the page cache to be read once."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def read(self, path: Path) -> Iterator[bytes]:
        try:
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(_READ_BYTES):
                    self._digest.update(chunk)
                    yield chunk
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error

    def checksum(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"

    def close(self) -> None:
        pass


class _HashBeside:
    """Hashes a file that is not read byte by byte in a thread of its own."""

    def __init__(self, path: Path | None) -> None:
        self._executor = ThreadPoolExecutor(1)
        self._checksum = self._executor.submit(file_checksum, path) if path else None

    def checksum(self) -> str:
        return self._checksum.result() if self._checksum else ""

    def close(self) -> None:
        self._executor.shutdown()


def _unpacked(path: Path) -> Iterator[bytes]:
    return read_chunks(path, lambda _: None)


def _line_blocks(chunks: Iterator[bytes], block_bytes: int) -> Iterator[Block]:
    """Chunks put together and split after a newline; what came before damage is handed out before it is raised."""
    lines = _Lines(block_bytes)
    damage = None
    try:
        for chunk in chunks:
            yield from lines.add(chunk)
    except DamagedSource as error:
        damage = error
    # A line that the damage truncated is no line.
    yield from lines.finish(is_whole=damage is None)
    if damage:
        raise damage


class _Lines:
    """Chunks on their way into blocks."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._max_bytes = max_record_bytes()
        self._parts: list[bytes] = []
        self._size = 0
        """Of the parts."""
        self._open_bytes = 0
        """Of the last line, which may continue. Once it exceeds the limit it is no longer in the parts."""

    def add(self, chunk: bytes) -> Iterator[Block]:
        """The blocks that the chunk completes."""
        if self._open_bytes > self._max_bytes:
            first_end = chunk.find(b"\n")
            self._open_bytes += len(chunk) if first_end < 0 else first_end
            if first_end < 0:
                return
            yield Block(TooLarge(self._open_bytes))
            self._open_bytes, chunk = 0, chunk[first_end + 1 :]
        newline = chunk.rfind(b"\n") + 1
        if newline and self._size + newline >= self._block_bytes:
            yield self._block(memoryview(chunk)[:newline])
            chunk, self._open_bytes = chunk[newline:], 0
            newline = 0
        self._parts.append(chunk)
        self._size += len(chunk)
        self._open_bytes = len(chunk) - newline if newline else self._open_bytes + len(chunk)
        if self._open_bytes > self._max_bytes:
            whole = b"".join(self._parts)[: -self._open_bytes]
            self._parts, self._size = [], 0
            if whole:
                yield Block(whole)

    def finish(self, is_whole: bool) -> Iterator[Block]:
        """What is left; without the last line where that is not whole."""
        if self._open_bytes > self._max_bytes:
            if is_whole:
                yield Block(TooLarge(self._open_bytes))
            return
        rest = b"".join(self._parts)
        rest = rest if is_whole else rest[: len(rest) - self._open_bytes]
        if rest:
            yield Block(rest)

    def _block(self, last: memoryview) -> Block:
        block = Block(b"".join([*self._parts, last]))
        self._parts, self._size = [], 0
        return block


def _table_blocks(source: Source, columns: Columns, block_bytes: int) -> Iterator[Block]:
    import pyarrow

    try:
        for piece in table_pieces(source, partial(_chosen, columns), lambda _: None):
            for batch in piece.batches():
                for part in batch.to_batches() if isinstance(batch, pyarrow.Table) else [batch]:
                    yield from map(Block, _cut(part, max(block_bytes, _READ_BYTES)))
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # without number it is pyarrow's: broken data
            raise UserError(f"{source.name}: cannot be read ({error.strerror})") from error
        raise DamagedSource(f"damaged or truncated ({(str(error).splitlines() or ['no more is known'])[0]})") from error


def _chosen(columns: Columns, source_name: str, schema: "pyarrow.Schema") -> list[str]:
    return record_columns(source_name, schema, columns)


def _cut(batch: "pyarrow.RecordBatch", max_bytes: int) -> "Iterator[pyarrow.RecordBatch]":
    """The rows in batches of at most `max_bytes` bytes, except for a row that is larger."""
    num_parts = -(-batch.nbytes // max_bytes)
    if batch.num_rows < 2 or num_parts < 2:
        yield batch
        return
    rows_per_part = -(-batch.num_rows // num_parts)
    for start in range(0, batch.num_rows, rows_per_part):
        yield from _cut(batch.slice(start, rows_per_part), max_bytes)
