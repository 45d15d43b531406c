"""Rows drawn from an input that is too large to be read, and how many good ones there are in all.

Files count as one long tape of bytes. Up to 256 MiB of it are read whole; of more, 128 stretches spread over its whole
length. A row belongs to the stretch in which it begins, so every row has the same chance whatever its length, and good
rows per byte of the stretches, times the bytes of the tape, is how many there are. Packed files are a tape of their
own; they can only be read from their beginning, where all stretches of a file are put together. Of streamed data sets
the first rows of some shards are read, and their number of rows must be known. With a limit the first rows of the input
are all there is.
"""

import bisect
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_tpt.errors import UserError
from megatron_tpt.records import ReadProgress, Row, Source, can_start_inside, read_between, read_blocks
from megatron_tpt.thinking.job import AugmentJob

_MAX_BYTES = 256 << 20
_NUM_STRETCHES = 128
_MAX_ROWS = 50_000  # of streams, and of the beginning of an input
_MAX_SHARDS = 64
_ROWS_PER_BLOCK = 1000

type Drawn = tuple[Source, Row]


@dataclass
class InputSample:
    """Good rows of an input, each with the same chance to be among them."""

    rows: list[Drawn]
    documents: float
    """Good rows in the whole input."""
    is_counted: bool
    """Whether all of them were counted, not estimated."""
    extent: str
    """Where the rows come from, in words."""


@dataclass
class _Reservoir:
    """Up to `size` of the good rows that it was shown, all with the same chance (algorithm R, Vitter 1985)."""

    size: int
    chance: random.Random
    rows: list[Drawn] = field(default_factory=list)
    num_seen: int = 0
    num_good: int = 0

    def show(self, source: Source, row: Row) -> None:
        self.num_seen += 1
        if row.record is None:
            return
        self.num_good += 1
        if len(self.rows) < self.size:
            self.rows.append((source, row))
        elif (at := self.chance.randrange(self.num_good)) < self.size:
            self.rows[at] = source, row


def draw_rows(job: AugmentJob, num_rows: int) -> InputSample:
    """`num_rows` good rows of the input of `job`, or all there are. Raises UserError where none is found, and for a
    streamed data set that does not say how many rows it has."""
    chance = random.Random(job.options.seed)
    if job.options.limit is not None:
        sample = _of_beginning(job, _Reservoir(num_rows, chance), job.options.limit)
    else:
        sample = _of_all(job, num_rows, chance)
    if not sample.rows:
        raise UserError(f"no records in what was read: {sample.extent}")
    return sample


def _of_all(job: AugmentJob, num_rows: int, chance: random.Random) -> InputSample:
    kinds: dict[Callable[[AugmentJob, Sequence[Source], _Reservoir], InputSample], list[Source]] = {}
    for source in job.sources:
        is_file = source.num_bytes is not None
        kind = _of_streams if not is_file else _of_files if can_start_inside(source) else _of_packed_files
        if source.num_bytes != 0:
            kinds.setdefault(kind, []).append(source)
    parts = [draw(job, sources, _Reservoir(num_rows, chance)) for draw, sources in kinds.items()]
    documents = sum(part.documents for part in parts)
    rows = []
    for part in parts:
        share = part.documents / documents if documents else 0
        rows += part.rows if len(parts) == 1 else chance.sample(part.rows, min(round(num_rows * share), len(part.rows)))
    extent = "; ".join(part.extent for part in parts)
    return InputSample(rows, documents, all(part.is_counted for part in parts), extent)


def _of_beginning(job: AugmentJob, reservoir: _Reservoir, limit: int) -> InputSample:
    end = min(limit, _MAX_ROWS)
    rows = ((source, row) for source in job.sources for row in _rows(job, source))
    for source, row in itertools.islice(rows, end):
        reservoir.show(source, row)
    is_counted = end == limit or reservoir.num_seen < end
    documents: float = reservoir.num_good
    if not is_counted:
        documents *= limit / end
        if all(source.num_bytes is not None for source in job.sources):  # which may have fewer rows
            documents = min(documents, _of_all(job, 1, reservoir.chance).documents)
    extent = f"the first {reservoir.num_seen:,} rows" + ("" if is_counted else f" of {limit:,}")
    return InputSample(reservoir.rows, documents, is_counted, extent)


def _of_streams(job: AugmentJob, sources: Sequence[Source], reservoir: _Reservoir) -> InputSample:
    datasets = dict.fromkeys(source.dataset for source in sources if source.dataset is not None)
    sizes = [dataset.num_rows() for dataset in datasets]
    extent = list(sources)
    if None not in sizes:  # else all have to be counted
        step = max(len(sources) / _MAX_SHARDS, 1)
        extent = [sources[int(i * step)] for i in range(min(len(sources), _MAX_SHARDS))]
    is_counted = len(extent) == len(sources)
    for i, source in enumerate(extent):
        quota = (_MAX_ROWS - reservoir.num_seen) // (1 if None in sizes else len(extent) - i)
        rows = _rows(job, source)
        for row in itertools.islice(rows, quota):
            reservoir.show(source, row)
        is_counted = is_counted and next(rows, None) is None
        if None in sizes and not is_counted:
            raise UserError(
                f"{source.name}: the data set has more than {_MAX_ROWS:,} rows and does not say how many; estimate "
                "from its first ones with --limit, or download it"
            )
    documents: float = reservoir.num_good
    if not is_counted:
        documents *= sum(size or 0 for size in sizes) / max(reservoir.num_seen, 1)
    places = "all rows" if is_counted else f"the first {reservoir.num_seen:,} rows"
    return InputSample(reservoir.rows, documents, is_counted, f"{places} of {len(extent)} streamed shards")


def _of_files(job: AugmentJob, sources: Sequence[Source], reservoir: _Reservoir) -> InputSample:
    total = sum(source.num_bytes or 0 for source in sources)
    num_bytes = 0
    for source, stretches in _spread(sources, total, reservoir.chance).items():
        for begin, end in stretches:
            num_bytes += end - begin
            for row in read_between(source, job.columns, begin, end):
                reservoir.show(source, row)
    is_counted = num_bytes == total
    extent = "all of the files" if is_counted else f"{_NUM_STRETCHES} stretches all over the files"
    return InputSample(reservoir.rows, reservoir.num_good * total / num_bytes, is_counted, extent)


def _of_packed_files(job: AugmentJob, sources: Sequence[Source], reservoir: _Reservoir) -> InputSample:
    total = sum(source.num_bytes or 0 for source in sources)
    by_source = _spread(sources, total, reservoir.chance)
    documents, allotted, num_cut = 0.0, 0, 0
    for source, stretches in by_source.items():
        length, num_good = sum(end - begin for begin, end in stretches), reservoir.num_good
        num_bytes = _show_beginning(job, source, length, reservoir)
        documents += (reservoir.num_good - num_good) * length / num_bytes
        allotted += length
        num_cut += num_bytes < (source.num_bytes or 0)
    is_counted = allotted == total
    extent = f"the beginning of {num_cut:,} of {len(by_source):,} packed files" if num_cut else "all of packed files"
    return InputSample(reservoir.rows, documents * total / allotted, is_counted, extent)


def _spread(sources: Sequence[Source], total: int, chance: random.Random) -> dict[Source, list[tuple[int, int]]]:
    """Stretches (begin, end) in bytes, by source: all of the tape, or one at a random place of each of its parts."""
    starts = [0, *itertools.accumulate(source.num_bytes or 0 for source in sources)]
    length, window = _MAX_BYTES // _NUM_STRETCHES, total // _NUM_STRETCHES
    tape = (
        [(i * window + chance.randrange(window - length + 1)) for i in range(_NUM_STRETCHES)] if window > length else []
    )
    by_source: dict[Source, list[tuple[int, int]]] = {}
    for begin, end in [(place, place + length) for place in tape] or [(0, total)]:
        at = bisect.bisect_right(starts, begin) - 1
        while at < len(sources) and starts[at] < end:
            stretch = max(begin - starts[at], 0), min(end, starts[at + 1]) - starts[at]
            if stretch[0] < stretch[1]:
                by_source.setdefault(sources[at], []).append(stretch)
            at += 1
    return by_source


def _show_beginning(job: AugmentJob, source: Source, length: int, reservoir: _Reservoir) -> int:
    """Show the rows in about the first `length` bytes of a file; returns the bytes that they take."""
    position, num_bytes = ReadProgress(), source.num_bytes or 0
    for row in _rows(job, source, position):
        reservoir.show(source, row)
        if length <= position.num_bytes < num_bytes:  # at the last byte there may be rows left: it counts for many
            return position.num_bytes
    return num_bytes


def _rows(job: AugmentJob, source: Source, position: ReadProgress | None = None) -> Iterator[Row]:
    for _, rows in read_blocks(source, job.columns, _ROWS_PER_BLOCK, lambda block: True, position):
        yield from rows
