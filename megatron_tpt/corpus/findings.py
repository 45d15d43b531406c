"""What is found of documents whichever data sets hold them: annotations, the hash of the text, and what strata look at.

    .work/scan/000002/000013.found.jsonl.zst        a line for every batch of documents
    .work/annotate/000002/000013.found.jsonl.zst    of documents that are kept alone

Annotators that take about as little time as reading a document annotate while the input is scanned, which is not read
once more for them then. Others annotate when duplicates are known, and the documents that are kept alone.
"""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from megatron_tpt.corpus.annotate import Annotator, make_annotators
from megatron_tpt.corpus.curate_options import CurateOptions
from megatron_tpt.corpus.documents import Document
from megatron_tpt.records import Record

if TYPE_CHECKING:
    from megatron_tpt.corpus.curate import CurateJob


class Finding(NamedTuple):
    """What is found of one document."""

    row: int
    """Its place in the source."""
    digest: int
    """The hash of its text, by which strata with a size choose; 0 of a job without strata."""
    meta: dict[str, Any]
    """The fields of its own `meta` that strata, lengths and data sets are read from."""
    annotations: dict[str, Any]
    """The fields that annotators found."""


_loaded: list[tuple[CurateOptions, list[Annotator]]] = []


def load_annotators(options: CurateOptions) -> list[Annotator]:
    """The annotators; a worker loads them once. Raises UserError for a model that cannot be loaded."""
    if not _loaded or _loaded[0][0] != options:
        _loaded[:] = [(options, make_annotators(options))]
    return _loaded[0][1]


def find(job: "CurateJob", records: Sequence[tuple[int, Record]]) -> list[Finding]:
    """What is found of records, each with its row."""
    import xxhash

    annotators = load_annotators(job.curate_options)
    documents = [Document.of(record) for _, record in records] if annotators else []
    results = [annotator.annotate(documents) for annotator in annotators]
    seed, names = job.curate_options.seed, job.fields_of_strata
    findings: list[Finding] = []
    for place, (row, record) in enumerate(records):
        digest = xxhash.xxh3_64_intdigest(record.text.encode(), seed=seed) if job.strata is not None else 0
        meta = {} if names.isdisjoint(record.meta) else {key: record.meta[key] for key in record.meta if key in names}
        annotations: dict[str, Any] = {}
        for result in results:
            annotations |= result[place]
        findings.append(Finding(row, digest, meta, annotations))
    return findings


def to_line(findings: Iterable[Finding]) -> bytes:
    """A line of JSON. Python's own holds `meta` exactly, with numbers of any size and those that are none."""
    return orjson.dumps(
        [(row, digest, json.dumps(meta) if meta else "", found) for row, digest, meta, found in findings]
    )


def read_findings(path: Path) -> Iterator[Finding]:
    """What a file of such lines holds."""
    import zstandard

    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as unpacked:
        for line in io.BufferedReader(unpacked):
            for row, digest, meta, annotations in orjson.loads(line):
                yield Finding(row, digest, json.loads(meta) if meta else {}, annotations)
