"""A source in blocks of some size that other threads can parse: stretches of lines, or batches of a table's rows."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import file_checksum
from megatron_tpt.records import Columns, Source
from megatron_tpt.records.lines import MAX_LINE_BYTES, read_chunks
from megatron_tpt.records.record import DamagedSource
from megatron_tpt.records.tables import Piece, arrow_pieces, parquet_pieces

if TYPE_CHECKING:
    import pyarrow

_READ_BYTES = 1 << 20


class Block(NamedTuple):
    """Some rows of a source, in order."""

    rows: "bytes | pyarrow.RecordBatch"
    """Whole lines (of one that is longer than a line may be, so much as shows that), or rows of a table."""


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
            if source.path is None or source.path.name.endswith((".parquet", ".arrow")):
                yield from _table_blocks(source, columns, block_bytes)
            else:
                chunks = hashing.read(source.path) if isinstance(hashing, _InlineHash) else _unpacked(source.path)
                yield from _line_blocks(chunks, block_bytes)
        except DamagedSource as error:
            damage = str(error)
        yield End(damage, hashing.checksum())


def _is_plain(source: Source) -> bool:
    return source.path is not None and source.path.name.endswith((".jsonl", ".json"))


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
    """Hashes a packed file in a thread of its own."""

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
    """Chunks put together and cut after a newline; what came before damage is handed out before it is raised."""
    parts: list[bytes] = []
    size = 0
    damage = None
    try:
        for chunk in chunks:
            newline = chunk.rfind(b"\n") + 1
            if newline and size + newline >= block_bytes:
                yield Block(b"".join([*parts, memoryview(chunk)[:newline]]))
                parts, size = [chunk[newline:]], len(chunk) - newline
            elif newline or size <= block_bytes + MAX_LINE_BYTES:
                parts.append(chunk)
                size += len(chunk)
    except DamagedSource as error:
        damage = error
    if size and any(parts):
        rest = b"".join(parts)
        # The line that the damage cut in two is no line.
        rest = rest[: rest.rfind(b"\n") + 1] if damage else rest
        if rest:
            yield Block(rest)
    if damage:
        raise damage


def _table_blocks(source: Source, columns: Columns, block_bytes: int) -> Iterator[Block]:
    import pyarrow

    try:
        for piece in _pieces(source, columns):
            for batch in piece.batches():
                for part in batch.to_batches() if isinstance(batch, pyarrow.Table) else [batch]:
                    yield from map(Block, _cut(part, max(block_bytes, _READ_BYTES)))
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # without number it is pyarrow's: broken data
            raise UserError(f"{source.name}: cannot be read ({error.strerror})") from error
        raise DamagedSource(f"damaged or cut short ({(str(error).splitlines() or ['no more is known'])[0]})") from error


def _cut(batch: "pyarrow.RecordBatch", max_bytes: int) -> "Iterator[pyarrow.RecordBatch]":
    """The rows in batches of no more than so many bytes, but for a row that is larger."""
    num_parts = -(-batch.nbytes // max_bytes)
    if batch.num_rows < 2 or num_parts < 2:
        yield batch
        return
    rows_per_part = -(-batch.num_rows // num_parts)
    for start in range(0, batch.num_rows, rows_per_part):
        yield from _cut(batch.slice(start, rows_per_part), max_bytes)


def _pieces(source: Source, columns: Columns) -> Iterator[Piece]:
    if source.dataset is not None:
        return source.dataset.pieces(source.name, source.shard, columns)
    assert source.path is not None
    read = parquet_pieces if source.path.name.endswith(".parquet") else arrow_pieces
    return read(source.path, columns, lambda _: None)
