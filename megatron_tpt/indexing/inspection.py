"""What an index holds, for people: the job behind `tools/inspect_index.py`."""

from pathlib import Path

import numpy
from rich import box
from rich.console import Console
from rich.table import Table

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.options import InspectOptions
from megatron_tpt.indexing.reader import Array, IndexReader, verify
from megatron_tpt.indexing.tokenizer import Tokenizer

_BAR_WIDTH = 40


def inspect_index(options: InspectOptions) -> None:
    """Print the counts and lengths of an index, one document with `document`, and check it whole with
    `verify`.

    An index without manifest, such as Megatron's own tools make, is shown too. Raises UserError for a damaged
    one.
    """
    console = Console(highlight=False, soft_wrap=True)
    manifest = Manifest.read(options.prefix) if Manifest.path(options.prefix).exists() else None
    reader = IndexReader(options.prefix)
    reader.check_structure()
    if options.document is not None:
        _print_document(reader, options, manifest)
        return
    _print_counts(console, reader, manifest)
    _print_lengths(console, reader.document_lengths())
    if options.verify and manifest is None:
        console.print("verified: sizes and structure; without a manifest there is nothing more to compare with")
    elif options.verify:
        verify(options.prefix)
        console.print("verified: sizes, structure, counts, checksums, tokens, ends of documents")


def _print_counts(console: Console, reader: IndexReader, manifest: Manifest | None) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("index", str(reader.prefix))
    table.add_row("documents", f"{reader.num_documents:,}")
    table.add_row("tokens", f"{reader.num_tokens:,} ({reader.dtype.name})")
    if manifest is None:
        table.add_row("manifest", "none: not made by this program")
    else:
        counts = manifest.counts
        table.add_row("  of documents", f"{counts.document_tokens:,}")
        with_thinking = f"in {counts.documents_with_thinking:,} documents, join {manifest.join}"
        table.add_row("  of thinking", f"{counts.thinking_tokens:,} ({with_thinking})")
        for reason, count in counts.skipped.items():
            table.add_row("skipped", f"{count:,} ({reason})")
        tokenizer = manifest.tokenizer
        table.add_row("tokenizer", f"{tokenizer.path} ({tokenizer.vocab_size:,} tokens, EOS {tokenizer.eos_id})")
        for source in manifest.sources[:10]:
            table.add_row("source", f"{source.path} ({source.documents:,} documents)")
        if len(manifest.sources) > 10:
            table.add_row("", f"and {len(manifest.sources) - 10:,} more sources")
    console.print(table)


def _print_lengths(console: Console, lengths: Array) -> None:
    """The spread of document lengths, and how many documents lie between powers of two."""
    if not len(lengths):
        return
    ranks = (0, 10, 50, 90, 99, 100)
    values = numpy.percentile(lengths, ranks, method="nearest")
    spread = ", ".join(f"{rank}% {value:,}" for rank, value in zip(ranks, values, strict=True))
    console.print(f"tokens per document: mean {lengths.mean():,.1f}; percentiles {spread}")
    table = Table("tokens", "documents", "", box=box.SIMPLE)
    table.columns[0].justify = table.columns[1].justify = "right"
    for first, last, count in length_histogram(lengths):
        bar = "#" * round(_BAR_WIDTH * count / len(lengths))
        table.add_row(f"{first:,} to {last:,}", f"{count:,}", bar)
    console.print(table)


def length_histogram(lengths: Array) -> list[tuple[int, int, int]]:
    """(shortest, longest, number of documents) between powers of two, from the first such range used to the
    last.
    """
    bits = numpy.frexp(lengths.astype(numpy.float64))[1]  # 0: 0, 1: 1, 2-3: 2, 4-7: 3, ...
    counts = numpy.bincount(bits)
    ranges = [(2 ** (bit - 1) if bit else 0, 2**bit - 1) for bit in range(len(counts))]
    return [(*ranges[bit], int(counts[bit])) for bit in range(int(bits.min()), len(counts))]


def _print_document(reader: IndexReader, options: InspectOptions, manifest: Manifest | None) -> None:
    assert options.document is not None
    folder = options.tokenizer or (Path(manifest.tokenizer.path) if manifest else None)
    if folder is None:
        raise UserError(f"{options.prefix} has no manifest that names its tokenizer; give --tokenizer DIR")
    tokenizer = Tokenizer(folder)
    if manifest is not None:
        manifest.require_tokenizer(options.prefix, tokenizer.fingerprint)
    tokens = reader.document(options.document)
    if len(tokens) and tokens.max() >= tokenizer.vocab_size:
        raise UserError(f"{options.prefix} holds tokens that {folder} does not have; give its own --tokenizer")
    print(f"document {options.document}, {len(tokens):,} tokens:")
    print(tokenizer.decode(tokens))  # plain: rich would expand the tabs
    print("tokens:", *tokens.tolist())
