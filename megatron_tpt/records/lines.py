"""Lines of a file, plain or packed: skipped without parsing, with damage and endless lines detected on the way."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from megatron_tpt.errors import failure
from megatron_tpt.records.formats import FileFormat, file_format
from megatron_tpt.records.json_files import as_lines
from megatron_tpt.records.limits import max_record_bytes, too_large
from megatron_tpt.records.record import DamagedSource

_CHUNK_BYTES = 1 << 20
# Packed bytes that are unpacked at a time: they become 16 MiB at most, by the highest ratios of gzip and Zstandard. The
# others, which have no such ratio, are asked for at most this much at a time.
_GZIP_BYTES = 16 << 10
_SMALL_BYTES = 512
_MOST_BYTES = 16 << 20
_XZ_MEMORY_BYTES = 512 << 20  # `xz -9` needs 65 MiB; a file may ask for 4 GiB


def read_chunks(path: Path, report_position: Callable[[int], None], begin: int = 0) -> Iterator[bytes]:
    """The lines of a file, unpacked, in chunks of about 1 MiB; of a plain one, from byte `begin` on. What a .json file
    holds comes as lines, too (see `json_files`). Raises DamagedSource where it is broken or truncated, UserError or
    Fault where it cannot be read.

    `report_position` is called with the place in the file to which it has been read.
    """
    format = file_format(path)
    chunks = _file_chunks(path, format, report_position, begin)
    return as_lines(chunks) if format is not None and format.kind == "json" else chunks


def _file_chunks(
    path: Path, format: FileFormat | None, report_position: Callable[[int], None], begin: int
) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=_CHUNK_BYTES) as file:
            file.seek(begin)
            for chunk in _joined(_pieces(format.packing if format else "", file)):
                report_position(file.tell())
                yield chunk
    except OSError as error:
        raise failure(f"{path}: cannot be read ({error.strerror or error})", error) from error


def _pieces(packing: str, file: IO[bytes]) -> Iterator[bytes]:
    if packing == ".gz":
        return _unpack(file, _GZIP_BYTES, lambda: zlib.decompressobj(wbits=31), zlib.error)
    if packing == ".bz2":
        return _unpack(file, _SMALL_BYTES, bz2.BZ2Decompressor, OSError, _MOST_BYTES)
    if packing == ".xz":
        new_stream = partial(lzma.LZMADecompressor, memlimit=_XZ_MEMORY_BYTES)
        return _unpack(file, _SMALL_BYTES, new_stream, lzma.LZMAError, _MOST_BYTES)
    if packing == ".zst":
        import zstandard

        # The command-line tool refuses windows over 128 MiB by default; large corpora are packed with 2 GiB.
        unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        return _unpack(file, _SMALL_BYTES, unpacker.decompressobj, zstandard.ZstdError)
    return iter(lambda: file.read(_CHUNK_BYTES), b"")


def _unpack(
    file: IO[bytes], num_bytes: int, new_frame: Callable[[], Any], damage: type[Exception], *limit: int
) -> Iterator[bytes]:
    """Unpack the frames (gzip: members; bz2, xz: streams) that follow each other in a file; those that take a `limit`
    give at most this many bytes at a time."""
    frame, num_frames = None, 0
    while packed := file.read(num_bytes):
        while packed := packed if frame else packed.lstrip(b"\0"):  # tapes and block devices pad with zeros
            if frame is None:
                frame = new_frame()
                num_frames += 1
            try:
                unpacked = frame.decompress(packed, *limit)
                while limit and not (frame.eof or frame.needs_input):
                    yield unpacked
                    unpacked = frame.decompress(b"", *limit)
            except damage as error:
                raise DamagedSource(f"damaged or truncated ({error})") from error
            yield unpacked
            packed = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise DamagedSource("damaged or truncated (the packed data is not whole)")
    if not num_frames:
        raise DamagedSource("damaged or truncated (no packed data in it)")


def _joined(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Pieces put together into chunks of some size; what came before damage is handed out before it is raised."""
    buffer = io.BytesIO()
    try:
        for piece in pieces:
            if len(piece) >= _CHUNK_BYTES and not buffer.tell():
                yield piece
                continue
            buffer.write(piece)
            if buffer.tell() >= _CHUNK_BYTES:
                yield buffer.getvalue()
                buffer = io.BytesIO()
    except DamagedSource:
        if buffer.tell():
            yield buffer.getvalue()
        raise
    if buffer.tell():
        yield buffer.getvalue()


class LineReader:
    """Takes or skips lines one after another; a damaged file ends with a DamagedSource in place of a line."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.row = 0
        """Number of the next line, from 0."""
        self.row_bytes = 0
        """Size of the line that was taken last."""
        self._chunks = chunks
        self._max_bytes = max_record_bytes()
        self._chunk = b""
        self._position = 0
        self._damage: DamagedSource | None = None

    def share_taken(self) -> float:
        """How much of the chunk that was loaded last has been taken or skipped."""
        return min(self._position / len(self._chunk), 1.0) if self._chunk else 0.0

    def close(self) -> None:
        """Close the file that the lines come from."""
        if isinstance(self._chunks, Generator):
            self._chunks.close()

    def has_rows(self) -> bool:
        """Whether there is something to take: a line, or the DamagedSource that ends a damaged file."""
        return self._load() or self._damage is not None

    def skip_to(self, row: int) -> None:
        """Make `row` the next line, or come to the end (of which a last line without newline is not counted)."""
        while self.row < row:
            if not self._load():
                self._damage = None
                return
            num_lines = self._chunk.count(b"\n", self._position)
            if num_lines < row - self.row:
                self.row += num_lines
                self._position = len(self._chunk)
            else:
                while self.row < row:
                    self._position = self._chunk.index(b"\n", self._position) + 1
                    self.row += 1

    def take(self) -> bytes:
        """The next line without its newline. Raises BadRecord for one that is too large, and DamagedSource."""
        begin = self._position
        end = self._chunk.find(b"\n", begin)
        if end < 0 or end - begin > self._max_bytes:
            line = self._take_long()
        else:
            line = self._chunk[begin:end]
            self._position = end + 1
            self.row_bytes = end - begin
        self.row += 1
        if self.row_bytes > self._max_bytes:
            raise too_large(self.row_bytes)
        return line.removeprefix(b"\xef\xbb\xbf") if self.row == 1 else line  # the mark some editors write first

    def _take_long(self) -> bytes:
        """A line that goes over the end of the chunk; nothing of it where it is too large."""
        parts: list[bytes] = []
        self.row_bytes = 0
        end = -1
        while end < 0 and self._load():
            begin = self._position
            end = self._chunk.find(b"\n", begin)
            part = self._chunk[begin:] if end < 0 else self._chunk[begin:end]
            self._position = begin + len(part) + 1
            self.row_bytes += len(part)
            if self.row_bytes <= self._max_bytes:
                parts.append(part)
            else:
                parts.clear()
        if self._damage is not None:
            damage, self._damage = self._damage, None
            raise damage
        return b"".join(parts)

    def _load(self) -> bool:
        """Whether bytes are left to read."""
        while self._position >= len(self._chunk):
            try:
                chunk = next(self._chunks, None)
            except DamagedSource as damage:
                self._damage = damage
                return False
            if chunk is None:
                return False
            self._chunk, self._position = chunk, 0
        return True
