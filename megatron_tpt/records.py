"""Records: the documents that go in, and the documents with their thinking that come out.

One record per line of JSONL (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`) or per row of Parquet (`.parquet`):

    {"id": str, "text": str, "thinking": str | null, "meta": {...}}

Only `text` must be there; foreign files name their own columns. Everything streams: memory does not grow with
the input.
"""

import gzip
import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_CHUNK_BYTES = 1 << 20
_ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class Record:
    """A document, with the thinking about it once that has been written."""

    id: str
    """Given by the source, or `content_id(text)`."""
    text: str
    """The document; never blank."""
    thinking: str | None = None
    """The thinking about `text`, without tags."""
    meta: dict[str, Any] = field(default_factory=dict)
    """How the thinking came about: source, generator, prompt, sampling, finish_reason, token counts, ..."""


@dataclass
class ReadCounts:
    """What `read_records` has done so far; filled while it reads."""

    read: int = 0
    """Good records handed out."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Bad records left out, by reason."""


class _BadRecord(Exception):
    """A line or row that is no record. `reason` is the same for all of its kind; `str()` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}{detail}")
        self.reason = reason


def content_id(text: str) -> str:
    """A record's id made from its content: the first 32 hex digits of SHA-256 over the UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def expand_inputs(paths: Sequence[str | Path]) -> list[Path]:
    """The record files behind `paths`: a file is itself, a folder is the record files in it, sorted.

    Folders are searched at any depth; hidden names are left out (unfinished files have such names). Raises
    UserError for a path that is missing, a folder without record files, a file of an unknown kind, or no path
    at all.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(
                file
                for file in path.rglob("*")
                if file.name.endswith(SUFFIXES)
                and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not found:
                raise UserError(f"{path}: no record files in this folder ({', '.join(SUFFIXES)})")
            files += found
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: unknown kind of file; records are read from {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise UserError("no input files were given")
    return files


def read_records(
    paths: Sequence[str | Path],
    *,
    text_column: str = "text",
    id_column: str = "id",
    on_bad_record: Literal["stop", "skip"] = "stop",
    limit: int | None = None,
    counts: ReadCounts | None = None,
) -> Iterator[Record]:
    """Read records one by one from files or folders, in order (see `expand_inputs`).

    `text_column` may name several columns, "question,answer": their texts are joined by a newline. Without
    the column "id" a record's id is `content_id(text)`; any other `id_column` must be there. `thinking` and
    `meta` are taken where present; other columns are not looked at. Blank lines are passed over. At most
    `limit` records are handed out.

    A bad record (no JSON object, no text, a text that is blank, no string or no Unicode) raises UserError
    naming "file:line" (for Parquet: the row, from 1), or is left out and counted with `on_bad_record="skip"`.
    A file that is damaged as a whole always raises.
    """
    counts = ReadCounts() if counts is None else counts
    columns = _text_columns(text_column)
    for path in expand_inputs(paths):
        for number, row in _rows(path, columns, id_column):
            if limit is not None and counts.read >= limit:
                return
            try:
                record = _parse(row, columns, id_column)
            except _BadRecord as bad:
                if on_bad_record == "stop":
                    hint = "mend the line or skip such records with --on-bad-record skip"
                    raise UserError(f"{path}:{number}: {bad}; {hint}") from None
                counts.skipped[bad.reason] += 1
                continue
            counts.read += 1
            yield record


def _text_columns(text_column: str) -> list[str]:
    columns = [name.strip() for name in text_column.split(",")]
    if not all(columns):
        raise UserError(f"text column {text_column!r}: give a column name, or several with commas between")
    return columns


def _parse(row: bytes | dict[str, Any], columns: Sequence[str], id_column: str) -> Record:
    """Make a record of a JSON line or of a Parquet row. Raises _BadRecord."""
    fields = _json_object(row) if isinstance(row, bytes) else row
    parts = [_string(fields, name) for name in columns]
    if None in parts:
        missing = columns[parts.index(None)]
        raise _BadRecord("no text", f" in column {missing!r} (the columns are {', '.join(fields) or 'none'})")
    text = "\n".join(part for part in parts if part is not None)
    if not text.strip():
        raise _BadRecord("empty text")
    thinking = _string(fields, "thinking")
    if thinking is not None and not thinking.strip():
        thinking = None
    return Record(_id(fields, id_column, text), text, thinking, _meta(fields.get("meta")))


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8"))  # json.loads(bytes) would let broken UTF-8 pass
    except UnicodeDecodeError as error:
        raise _BadRecord("not UTF-8", f" ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise _BadRecord("not JSON", f" ({error})") from None
    if not isinstance(fields, dict):
        raise _BadRecord("not a JSON object")
    return fields


def _string(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise _BadRecord(f"column {name!r} is not a string", f" but {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # "\ud800" is legal JSON and no character
            raise _BadRecord(f"column {name!r} holds half a surrogate pair") from None
    return value


def _id(fields: Mapping[str, Any], id_column: str, text: str) -> str:
    value = fields.get(id_column)
    if value is None or value == "":
        if id_column != "id":
            raise _BadRecord("no id", f" in column {id_column!r}")
        return content_id(text)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise _BadRecord("id is neither string nor integer")
    return _string(fields, id_column) or ""


def _meta(value: Any) -> dict[str, Any]:
    """`meta` is ours where it is an object (Parquet keeps it as JSON); a foreign column of that name is
    left.
    """
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _rows(path: Path, columns: Sequence[str], id_column: str) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """Number (from 1) and content of every line or row of one file."""
    if path.name.endswith(".parquet"):
        yield from enumerate(_parquet_rows(path, columns, id_column), start=1)
        return
    try:
        with _open_lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark some editors write
                if not line.isspace() and line:
                    yield number, line
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); make or fetch the file again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def _open_lines(path: Path) -> Iterator[Iterable[bytes]]:
    with path.open("rb") as file:
        if path.name.endswith(".gz"):
            with gzip.open(file) as unpacked:
                yield unpacked
        elif path.name.endswith(".zst"):
            yield io.BufferedReader(_ZstdFile(file), _CHUNK_BYTES)
        else:
            yield file


class _ZstdFile(io.RawIOBase):
    """The unpacked bytes of a Zstandard file of one frame or several.

    `zstandard.open` ends silently where a file was cut; this raises EOFError.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._chunks = self._unpack(file)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    @staticmethod
    def _unpack(file: IO[bytes]) -> Iterator[bytes]:
        import zstandard

        frame = None
        try:
            while packed := file.read(_CHUNK_BYTES // 8):
                while packed:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(packed)
                    packed = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        if frame is not None:
            raise EOFError("the last Zstandard frame is not whole")


def _parquet_rows(path: Path, columns: Sequence[str], id_column: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for name in columns:
                if name not in names:
                    raise UserError(f"{path}: no column {name!r}; its columns are {', '.join(names)}")
            wanted = [name for name in dict.fromkeys([*columns, id_column, "thinking", "meta"]) if name in names]
            for batch in file.iter_batches(_ROWS_PER_BATCH, columns=wanted):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as Parquet ({str(error).splitlines()[0]})") from error


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Write `records` to `path`, in the format its suffix names, and return how many there were.

    The file appears whole or not at all, and the same records make the same bytes.
    """
    path = Path(path)
    with atomic_write(path) as temporary:
        if path.name.endswith(".parquet"):
            return _write_parquet(temporary, records)
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: records are written to {', '.join(SUFFIXES)}")
        num_records = 0
        with _create(temporary) as file:
            for record in records:
                file.write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
                num_records += 1
        return num_records


@contextmanager
def _create(path: Path) -> Iterator[IO[bytes]]:
    with path.open("wb") as file:
        if path.name.endswith(".gz"):  # without name and time: the same records, the same bytes
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                yield cast(IO[bytes], packed)
        elif path.name.endswith(".zst"):
            import zstandard

            with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as packed:
                yield packed
        else:
            yield file


def _write_parquet(path: Path, records: Iterable[Record]) -> int:
    import pyarrow
    import pyarrow.parquet

    # `meta` is JSON: records differ in its keys, a Parquet column has one type.
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("id", "text", "thinking", "meta")])
    num_records = 0
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in itertools.batched(records, _ROWS_PER_BATCH):
            rows = [asdict(record) | {"meta": json.dumps(record.meta)} for record in batch]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))
            num_records += len(batch)
    return num_records
