"""Which records of an input make documents: those whose `meta` meets a condition."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow

from megatron_tpt.records.parsing import meta_of, meta_of_row, parse_object
from megatron_tpt.records.record import BadRecord
from megatron_tpt.records.where import Where

NOT_SELECTED = "not selected by --where"
"""Why a record is skipped that is not bad."""


@dataclass(frozen=True)
class Selection:
    """The records that `where` selects, or all."""

    where: Where | None = None

    def takes(self, meta: Mapping[str, Any]) -> bool:
        """Whether a record is selected."""
        return self.where is None or self.where.matches(meta)

    def apply(self, rows: bytes | pyarrow.RecordBatch) -> tuple[bytes | pyarrow.RecordBatch, int]:
        """The lines or rows that are selected, and how many others there are.

        Blank lines stay. Raises BadRecord where a line is no record.
        """
        if self.where is None:
            return rows, 0
        if isinstance(rows, bytes):
            lines = rows.removesuffix(b"\n").split(b"\n")
            kept = [line for line in lines if self._takes_line(line)]
            return b"".join(line + b"\n" for line in kept), len(lines) - len(kept)
        if "meta" not in rows.schema.names:
            return (rows, 0) if self.takes({}) else (rows.slice(0, 0), rows.num_rows)
        try:
            metas = rows.column("meta").to_pylist()
        except (ValueError, OverflowError) as error:  # a value that Python does not have
            raise BadRecord("meta cannot be read", f"({error})") from None
        is_taken = [self.takes(meta_of_row({"meta": meta})) for meta in metas]
        kept_rows = rows.filter(pyarrow.array(is_taken, pyarrow.bool_()))
        return kept_rows, rows.num_rows - kept_rows.num_rows

    def _takes_line(self, line: bytes) -> bool:
        fields = parse_object(line, ["meta"])
        return fields is None or self.takes(meta_of(fields))


def num_not_selected(number: int) -> Counter[str]:
    """The reason why they are skipped, with the number of records that are not selected."""
    return Counter({NOT_SELECTED: number}) if number else Counter()
