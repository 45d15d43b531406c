"""A sample of the input: documents from the start, the middle and the end of its first, middle and last file."""

import itertools
from collections.abc import Iterator, Sequence

from megatron_tpt.records import Columns, Record, Source, read_blocks
from megatron_tpt.records.formats import file_format
from megatron_tpt.records.parsing import parse_line
from megatron_tpt.records.record import BadRecord

_DOCUMENTS_PER_PLACE = 40
_PLACE_BYTES = 1 << 18
_MAX_CHARACTERS = 10_000


def sample_texts(sources: Sequence[Source], columns: Columns) -> list[str]:
    """Documents and thinking from up to nine places; of a packed file or a table, from its start only.

    Bad records are skipped: they are reported when the job reaches them.
    """
    chosen = {0, len(sources) // 2, len(sources) - 1}
    texts: list[str] = []
    for number in sorted(chosen):
        for record in _records(sources[number], columns):
            for text in filter(None, (record.text, record.thinking)):
                # Of long texts the beginning, the middle and the end in turn.
                begin = max(0, len(text) - _MAX_CHARACTERS) * (len(texts) % 3) // 2
                texts.append(text[begin : begin + _MAX_CHARACTERS])
    return texts


def _records(source: Source, columns: Columns) -> Iterator[Record]:
    format = file_format(source.path) if source.path else None
    if source.path is None or format is None or not format.has_plain_lines:
        for _, rows in itertools.islice(read_blocks(source, columns, _DOCUMENTS_PER_PLACE, lambda _: True), 1):
            yield from (row.record for row in rows if row.record is not None)
        return
    num_bytes = source.num_bytes or 0
    with source.path.open("rb") as file:
        for place in sorted({0, num_bytes // 2, max(num_bytes - _PLACE_BYTES, 0)}):
            file.seek(place)
            lines = file.read(_PLACE_BYTES).split(b"\n")
            for line in lines[place > 0 : _DOCUMENTS_PER_PLACE]:
                try:
                    record = parse_line(line, columns) if line else None
                except BadRecord:  # cut by the end of the stretch, for instance
                    continue
                if record is not None:
                    yield record
