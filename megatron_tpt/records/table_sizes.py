"""How large rows of tables are once their dictionaries are decoded: a few bytes of a file may expand to any number.

pyarrow is imported where it is needed, so that the command line's help stays fast.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_LONG_VALUE_BYTES = 16 << 10
"""From here on, the values of one row may be large together."""


def bounded(
    batch: "pyarrow.RecordBatch | pyarrow.Table", max_bytes: int
) -> "Iterator[pyarrow.RecordBatch | pyarrow.Table]":
    """`batch` in slices of at most `max_bytes`, decoded, or of a single row."""
    if batch.num_rows <= 1 or not any(map(_has_dictionary, batch.schema.types)) or decoded_bytes(batch) <= max_bytes:
        yield batch
        return
    middle = batch.num_rows // 2
    yield from bounded(batch.slice(0, middle), max_bytes)
    yield from bounded(batch.slice(middle), max_bytes)


def decoded_bytes(batch: "pyarrow.RecordBatch | pyarrow.Table") -> int:
    """The size of rows, of dictionaries what is used of them, as often as it is."""
    chunks = (chunk for column in batch.columns for chunk in getattr(column, "chunks", [column]))
    return sum(map(_array_bytes, chunks))


def long_dictionary_values(
    open_file: "Callable[..., pyarrow.parquet.ParquetFile]",
    file: "pyarrow.parquet.ParquetFile",
    group: int,
    names: list[str],
) -> tuple[int, list[str]]:
    """What the dictionaries of a row group hold, of its columns `names`: the bytes of the longest value of
    a row, and the columns (by their paths) of which a row takes several values, long ones among them."""
    metadata = file.metadata.row_group(group)
    texts = [
        column.path_in_schema
        for column in map(metadata.column, range(metadata.num_columns))
        if column.path_in_schema.split(".")[0] in names
        and column.physical_type == "BYTE_ARRAY"
        and column.has_dictionary_page
    ]
    if not texts or not metadata.num_rows:
        return 0, []
    with open_file(read_dictionary=texts) as probe:  # a chunk has one dictionary, which its first row brings along
        first = next(iter(probe.iter_batches(1, [group], names)), None)
    longest = {} if first is None else dict(zip(first.schema.names, map(_longest_value, first.columns), strict=True))
    nested = [path for path in texts if "." in path and longest.get(path.split(".")[0], 0) > _LONG_VALUE_BYTES]
    return max((longest.get(path, 0) for path in texts), default=0), nested


def _has_dictionary(type: Any) -> bool:
    import pyarrow.types

    if pyarrow.types.is_dictionary(type):
        return True
    return any(_has_dictionary(type.field(i).type) for i in range(type.num_fields))


def _inner(array: Any) -> list[Any]:
    """The arrays that an array of a nested type is made of."""
    import pyarrow.types

    if pyarrow.types.is_struct(array.type):
        return array.flatten()
    if pyarrow.types.is_map(array.type):
        return [array.keys, array.items]
    if pyarrow.types.is_nested(array.type) and hasattr(array, "flatten"):
        return [array.flatten()]
    return []


def _value_lengths(array: Any) -> Any:
    """Bytes of each value of a dictionary; None where they are small, such as numbers."""
    import pyarrow.compute

    try:
        return pyarrow.compute.binary_length(array.dictionary)
    except pyarrow.ArrowException:
        return None


def _array_bytes(array: Any) -> int:
    import pyarrow.compute

    if pyarrow.types.is_dictionary(array.type):
        lengths = _value_lengths(array)
        if lengths is None:
            return array.indices.nbytes + array.dictionary.nbytes
        return array.indices.nbytes + (pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0)
    if _has_dictionary(array.type) and (inner := _inner(array)):
        return sum(map(_array_bytes, inner))
    return array.nbytes


def _longest_value(array: Any) -> int:
    import pyarrow.compute

    if pyarrow.types.is_dictionary(array.type):
        lengths = _value_lengths(array)
        return 0 if lengths is None else pyarrow.compute.max(lengths).as_py() or 0
    return max(map(_longest_value, _inner(array)), default=0)
