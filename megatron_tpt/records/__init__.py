"""Records: the documents that go in, and the documents with their thinking that come out.

One record per line of JSON or per row of a table (see docs/data.md for all that is read):

    {"id": str, "text": str, "thinking": str | null, "meta": {...}}

Only `text` must be there; foreign data names its own columns, and may be in files, folders, patterns or data sets of
the Hugging Face Hub (see `expand_sources`). Everything streams: memory does not grow with the input. May import the
single modules (errors, files, names, ...) alone.
"""

from megatron_tpt.records.folders import REJECTS
from megatron_tpt.records.parsing import Columns
from megatron_tpt.records.reading import (
    DAMAGED,
    OnBadRecord,
    ReadCounts,
    ReadProgress,
    Row,
    can_start_inside,
    describe,
    read_between,
    read_blocks,
    read_records,
)
from megatron_tpt.records.record import Record, content_id
from megatron_tpt.records.rows import RawRow, notes_of_columns_not_kept, read_rows
from megatron_tpt.records.sources import SUFFIXES, Source, expand_files, expand_inputs, expand_sources
from megatron_tpt.records.writing import json_lines, write_json_lines, write_records

__all__ = [
    "DAMAGED",
    "REJECTS",
    "SUFFIXES",
    "Columns",
    "OnBadRecord",
    "RawRow",
    "ReadCounts",
    "ReadProgress",
    "Record",
    "Row",
    "Source",
    "can_start_inside",
    "content_id",
    "describe",
    "expand_files",
    "expand_inputs",
    "expand_sources",
    "json_lines",
    "notes_of_columns_not_kept",
    "read_between",
    "read_blocks",
    "read_records",
    "read_rows",
    "write_json_lines",
    "write_records",
]
