"""What an index holds, for people and for programs: the job behind `tools/inspect_index.py`."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy
from rich import box
from rich.console import Console
from rich.table import Table

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.comparison import Difference, first_difference
from megatron_tpt.indexing.inspection_options import InspectOptions
from megatron_tpt.indexing.manifest import Manifest, advice_without_index
from megatron_tpt.indexing.marks import mark_thinking
from megatron_tpt.indexing.pack_manifest import PackManifest, is_packed
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packed_rows import ends_of_turns, print_row, row_report
from megatron_tpt.indexing.reader import Array, IndexReader
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.indexing.verification import check_structure, verify
from megatron_tpt.logs import print_result
from megatron_tpt.names import counted, shown_lines
from megatron_tpt.rich_text import plain

_BAR_WIDTH = 40
_PERCENTILES = (0, 10, 50, 90, 99, 100)


def inspect_index(options: InspectOptions) -> bool:
    """Print the counts and lengths of an index, or one document, or the first difference from another index.

    The documents of a packed index are its rows, shown by their examples. An index without manifest, such as Megatron's
    own tools make, is shown too. Returns False when a comparison found a difference. Raises UserError for a damaged
    index.
    """
    if not Path(f"{options.prefix}.idx").exists():
        raise UserError(advice_without_index(options.prefix))
    packed = PackedIndex(options.prefix) if is_packed([options.prefix]) else None
    manifest = packed.manifest if packed is not None else _read_manifest(options.prefix)
    reader = IndexReader(options.prefix)
    check_structure(reader)
    if options.compare is not None:
        return _compare(options, options.compare)
    if options.document is not None:
        tokenizer = _tokenizer(options, manifest)
        if packed is not None:
            report = row_report(packed, options.document, tokenizer)
            _print_json(report) if options.json else print_row(report)
        else:
            report = document_report(reader, options.document, tokenizer)
            _print_json(report) if options.json else _print_document(report)
        return True
    report = index_report(reader, manifest)
    if packed is not None:
        report["end_of_turn"] = ends_of_turns(packed)
    if options.verify:
        report["verified"] = ["sizes", "structure"]
        if packed is not None:
            packed.verify()
            report["verified"] += ["counts", "bounds of examples", "checksums"]
            report["verified"] += ["tokenizer"] if packed.manifest.tokenizer_checksums else []
        elif manifest is not None:
            verify(options.prefix)
            report["verified"] += ["counts", "checksums", "tokens", "ends of documents"]
    _print_json(report) if options.json else _print_report(report)
    return True


def _read_manifest(prefix: Path) -> Manifest | None:
    return Manifest.read(prefix) if Manifest.path(prefix).exists() else None


def index_report(reader: IndexReader, manifest: Manifest | PackManifest | None) -> dict[str, Any]:
    """The counts, the spread of lengths and the manifest (None without one), as JSON has them."""
    lengths = reader.document_lengths()
    report: dict[str, Any] = {
        "prefix": str(reader.prefix),
        "documents": reader.num_documents,
        "sequences": reader.num_sequences,
        "tokens": reader.num_tokens,
        "dtype": reader.dtype.name,
        "tokens_per_document": None,
        "manifest": dataclasses.asdict(manifest) if manifest else None,
    }
    if len(lengths):
        values = numpy.percentile(lengths, _PERCENTILES, method="nearest").tolist()
        report["tokens_per_document"] = {
            "mean": float(lengths.mean()),
            "percentiles": dict(zip(map(str, _PERCENTILES), values, strict=True)),
            "histogram": [
                {"from": first, "to": last, "documents": count} for first, last, count in length_histogram(lengths)
            ],
        }
    return report


def length_histogram(lengths: Array) -> list[tuple[int, int, int]]:
    """(shortest, longest, number of documents) between powers of two, from the first such range used to the
    last.
    """
    bits = numpy.frexp(lengths.astype(numpy.float64))[1]  # 0: 0, 1: 1, 2-3: 2, 4-7: 3, ...
    counts = numpy.bincount(bits)
    ranges = [(2 ** (bit - 1) if bit else 0, 2**bit - 1) for bit in range(len(counts))]
    return [(*ranges[bit], int(counts[bit])) for bit in range(int(bits.min()), len(counts))]


def document_report(reader: IndexReader, number: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """One document in parts that are all document or all thinking, each with its text and tokens."""
    tokens = reader.document(number)
    if len(tokens) and tokens.max() >= tokenizer.vocab_size:
        raise UserError(f"{reader.prefix} holds tokens that {tokenizer.folder} does not have; give its own --tokenizer")
    marks = mark_thinking(tokens, list(tokenizer.open_ids), list(tokenizer.close_ids), tokenizer.eos_id)
    cuts = [0, *(numpy.flatnonzero(numpy.diff(marks)) + 1).tolist(), len(tokens)]
    parts = [
        {
            "kind": "thinking" if marks[begin] else "document",
            "text": tokenizer.decode(tokens[begin:end]),
            "tokens": tokens[begin:end].tolist(),
        }
        for begin, end in itertools.pairwise(cuts)
        if begin < end
    ]
    return {"document": number, "num_tokens": len(tokens), "thinking_tokens": int(marks.sum()), "parts": parts}


def _tokenizer(options: InspectOptions, manifest: Manifest | PackManifest | None) -> Tokenizer:
    folder = options.tokenizer or _own_tokenizer(options.prefix, manifest)
    if folder is None:
        raise UserError(f"{options.prefix} has no manifest that names its tokenizer; give --tokenizer DIR")
    tokenizer = Tokenizer(folder)
    if manifest is not None and manifest.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{options.prefix}: made with another tokenizer than that of {folder}: give the one it was made with "
            f"(--tokenizer; it was at {manifest.tokenizer.path})"
        )
    return tokenizer


def _own_tokenizer(prefix: Path, manifest: Manifest | PackManifest | None) -> Path | None:
    if isinstance(manifest, PackManifest) and manifest.tokenizer_checksums:
        return PackManifest.tokenizer_path(prefix)
    return Path(manifest.tokenizer.path) if manifest else None


def _compare(options: InspectOptions, other: Path) -> bool:
    difference = first_difference(options.prefix, other)
    num_packed = sum(PackManifest.path(prefix).exists() for prefix in (options.prefix, other))
    if difference is None and num_packed == 2:
        row = PackedIndex(options.prefix).first_difference_of_masks(PackedIndex(other))
        if row is not None:
            difference = Difference(row, None, f"the tokens agree, but other parts are learned from row {row} on")
    if options.json:
        found = dataclasses.asdict(difference) if difference else None
        _print_json({"prefix": str(options.prefix), "other": str(other), "difference": found})
    elif difference is not None:
        print_result(shown_lines(difference.description))
    else:
        print_result(
            "identical" if num_packed != 1 else "identical in their tokens; only one of them is a packed index"
        )
    return difference is None


def _print_json(report: dict[str, Any]) -> None:
    print_result(json.dumps(report, indent=1))


def _print_report(report: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("index", plain(report["prefix"]))
    table.add_row("documents", f"{report['documents']:,}")
    if report["sequences"] != report["documents"]:
        table.add_row("sequences", f"{report['sequences']:,}")
    table.add_row("tokens", f"{report['tokens']:,} ({report['dtype']})")
    _add_manifest(table, report["manifest"])
    if "end_of_turn" in report:
        ends = ", ".join(f"{end['token']} ({end['id']})" for end in report["end_of_turn"])
        table.add_row("ends of turns", plain(ends) or "not noted")
    console.print(table)
    if report["tokens_per_document"] is not None:
        _print_lengths(console, report["tokens_per_document"], report["documents"])
    if "verified" in report:
        console.print("verified: " + ", ".join(report["verified"]))
        if report["manifest"] is None:
            console.print("without a manifest there is nothing more to compare with")


def _add_manifest(table: Table, manifest: dict[str, Any] | None) -> None:
    if manifest is None:
        table.add_row("manifest", "none: not made by this program")
        return
    counts, tokenizer, sources = manifest["counts"], manifest["tokenizer"], manifest["sources"]
    has_examples = "loss_mask" in manifest
    if has_examples:
        rows = f"rows for sequences of {manifest['settings']['sequence_length']:,}, {manifest['efficiency']:.2%} full"
        table.add_row("  learned", f"{counts['loss_tokens']:,} (mask from {plain(str(manifest['loss_mask']))})")
        truncated = f"{counts['truncated']:,} of them truncated"
        table.add_row("packed", f"{counts['examples']:,} examples, {truncated}, in {counts['rows']:,} {rows}")
    else:
        with_thinking = f"in {counts['documents_with_thinking']:,} documents, join {manifest['join']}"
        table.add_row("  of documents", f"{counts['document_tokens']:,}")
        table.add_row("  of thinking", f"{counts['thinking_tokens']:,} ({with_thinking})")
    places = counts.get("skipped_example", {})
    for reason, count in counts["skipped"].items():
        table.add_row("skipped", plain(f"{count:,}: {reason}" + (f" ({places[reason]})" if reason in places else "")))
    of = f"{tokenizer['vocab_size']:,} tokens, EOS {tokenizer['eos_id']}"
    table.add_row("tokenizer", plain(f"{tokenizer['path']} ({of})"))
    if manifest.get("tokenizer_checksums"):
        table.add_row("", plain(f"carried along: {', '.join(manifest['tokenizer_checksums'])}"))
    for source in sources[:10]:
        kind = "examples" if has_examples else "documents"
        table.add_row("source", plain(f"{source['path']} ({source['documents']:,} {kind})"))
    if len(sources) > 10:
        table.add_row("", f"and {counted(len(sources) - 10, 'more source')}")


def _print_lengths(console: Console, lengths: dict[str, Any], num_documents: int) -> None:
    """The spread of document lengths, and how many documents lie between powers of two."""
    spread = ", ".join(f"{rank}% {value:,}" for rank, value in lengths["percentiles"].items())
    console.print(f"tokens per document: mean {lengths['mean']:,.1f}; percentiles {spread}")
    table = Table("tokens", "documents", "", box=box.SIMPLE)
    table.columns[0].justify = table.columns[1].justify = "right"
    for row in lengths["histogram"]:
        bar = "#" * round(_BAR_WIDTH * row["documents"] / num_documents)
        table.add_row(f"{row['from']:,} to {row['to']:,}", f"{row['documents']:,}", bar)
    console.print(table)


def _print_document(report: dict[str, Any]) -> None:
    """Plain print: rich would expand the tabs."""
    print_result(
        f"document {report['document']}, {report['num_tokens']:,} tokens, {report['thinking_tokens']:,} of thinking:"
    )
    for part in report["parts"]:
        print_result(f"--- {part['kind']}, {len(part['tokens']):,} tokens ---")
        print_result(shown_lines(part["text"]))
    print_result("--- tokens ---")
    print_result(*(token for part in report["parts"] for token in part["tokens"]))
