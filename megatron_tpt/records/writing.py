"""Writing records: files that appear whole or not at all, and the same bytes for the same records."""

import gzip
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import orjson

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write
from megatron_tpt.records.record import Record
from megatron_tpt.records.sources import SUFFIXES

_RECORDS_PER_BATCH = 1024


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Write `records` to `path`, in the format its suffix names, and return how many there were.

    The file appears whole or not at all, and the same records make the same bytes. NaN and infinity in `meta`, which
    JSON lacks, become null.
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
                file.write(_to_json(_fields(record)) + b"\n")
                num_records += 1
        return num_records


def _fields(record: Record) -> dict[str, Any]:
    return {"id": record.id, "text": record.text, "thinking": record.thinking, "meta": record.meta}


def _to_json(value: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # integers beyond 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@contextmanager
def json_lines(path: Path) -> Iterator[Callable[[bytes], object]]:
    """Write a `.jsonl`, packed as its suffix says, that appears whole or not at all: yields what adds a line."""
    with atomic_write(path) as temporary, _create(temporary, has_checksum=False) as file:
        yield lambda line: file.write(line + b"\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write rows other than records, such as problems, as JSON lines, in the way of `json_lines`."""
    with json_lines(path) as add:
        for value in values:
            add(json.dumps(value).encode())


@contextmanager
def _create(path: Path, *, has_checksum: bool = True) -> Iterator[IO[bytes]]:
    """`has_checksum`: put one into a .zst file."""
    with path.open("wb") as file:
        if path.name.endswith(".gz"):  # without name and time: the same records, the same bytes
            with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed:
                yield cast(IO[bytes], packed)
        elif path.name.endswith(".zst"):
            import zstandard

            with zstandard.ZstdCompressor(write_checksum=has_checksum).stream_writer(file, closefd=False) as packed:
                yield packed
        else:
            yield file


def _write_parquet(path: Path, records: Iterable[Record]) -> int:
    import pyarrow
    import pyarrow.parquet

    # `meta` is JSON: records differ in its keys, a Parquet column has one type.
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("id", "text", "thinking", "meta")])
    num_records = 0
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for batch in itertools.batched(records, _RECORDS_PER_BATCH):
            rows = [_fields(record) | {"meta": _to_json(record.meta).decode()} for record in batch]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))
            num_records += len(batch)
    return num_records
