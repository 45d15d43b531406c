"""Examples of different lengths in rows of a fixed length: how they are placed, and how packed rows are stored.

A packed index is an indexed dataset like any other, `PREFIX.bin` and `PREFIX.idx`, whose documents are the rows: the
examples of a row one after the other, without padding. `PREFIX.sft` says where the examples are and what of them is
learned (little-endian):

    8 bytes  "SFTROWS\\0"    8 bytes  version, 1    8 bytes each  number of rows, examples, runs
    int64    first example of each row, and the number of examples at the end
    int64    first run of each example, and the number of runs at the end
    int32    length of each run, in tokens: of an example without loss, with loss, without loss, ... in turn

`PREFIX.tokenizer/` is the tokenizer, with the chat template that was used. `PREFIX.sft.json` is the manifest, written
last: without it the index is not finished.
"""

import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.files import file_checksum, no_links, write_json
from megatron_tpt.indexing.conversations import Example
from megatron_tpt.indexing.manifest import Source, TokenizerInfo
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.verification import check_structure
from megatron_tpt.json_data import read_json

FORMAT_VERSION = 1
_MAGIC = b"SFTROWS\0"
_HEADER = struct.Struct("<8sQQQQ")


class Packing(NamedTuple):
    """Which example is in which row."""

    order: numpy.ndarray
    """The examples row by row, int64 [num_examples]."""
    bounds: numpy.ndarray
    """Where each row begins in `order`, and its length at the end: int64 [num_rows + 1]."""

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return len(self.bounds) - 1

    def row(self, number: int) -> numpy.ndarray:
        """The examples of one row."""
        return self.order[self.bounds[number] : self.bounds[number + 1]]


def pack(lengths: numpy.ndarray, capacity: int) -> Packing:
    """First-fit-decreasing: the longest example first, each into the first row that has room. O(n log n).

    lengths [n], from 1 to `capacity`. Never more than 11/9 of the fewest rows possible, plus 6/9 (Dosa, 2007).
    """
    lengths = numpy.asarray(lengths, dtype=numpy.int64)
    if not len(lengths):
        return Packing(numpy.zeros(0, dtype=numpy.int64), numpy.zeros(1, dtype=numpy.int64))
    assert lengths.min() >= 1 and lengths.max() <= capacity
    # At most one row stays half empty, or its content would have gone into another such row.
    max_rows = min(len(lengths), 2 * int(lengths.sum()) // capacity + 1)
    num_leaves = 1 << (max_rows - 1).bit_length()
    # A binary tree over the rows, the root at 1, the children of i at 2i and 2i + 1: the most room below each node.
    room = [capacity] * (2 * num_leaves)
    by_length = numpy.argsort(-lengths, kind="stable")
    rows = []
    for length in lengths[by_length].tolist():
        node = 1
        while node < num_leaves:
            node *= 2
            if room[node] < length:
                node += 1
        rows.append(node - num_leaves)
        room[node] -= length
        while node > 1:
            most = max(room[node], room[node ^ 1])
            node //= 2
            if room[node] == most:
                break
            room[node] = most
    row_of = numpy.array(rows)
    bounds = numpy.concatenate([[0], numpy.cumsum(numpy.bincount(row_of))])
    return Packing(by_length[numpy.argsort(row_of, kind="stable")], bounds)


@dataclass(frozen=True)
class PackSettings:
    """What decides, with the input, every byte of a packed index."""

    tokenizer_fingerprint: str
    eos_id: int
    """The token after a response."""
    columns: tuple[str, ...]
    """The messages, or the prompt and the response."""
    chat_template: str | None
    """Checksum of the chat template and the special tokens it is given; none for prompts and responses."""
    date: str | None
    """What the chat template took for today."""
    sequence_length: int
    """Of the model's inputs; a row holds one token more, the last label."""
    on_too_long: str
    on_bad_example: str
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template of all conversations."""
    tools_column: str = "tools"
    inline_reasoning: bool = False
    ignore_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class PackCounts:
    """What is in a packed index, and what is not."""

    examples: int
    rows: int
    fewest_rows: int
    """A lower bound for any packing: tokens over the length of a row, rounded up."""
    tokens: int
    loss_tokens: int
    truncated: int
    """Examples that were truncated to the length of a row; they are among `examples`."""
    skipped: dict[str, int]
    """Records that were skipped, by reason."""
    skipped_example: dict[str, str] = field(default_factory=dict)
    """The first of them by reason: its place, and what is wrong with it."""

    def efficiency(self, sequence_length: int) -> float:
        """The share of the rows' places that hold a token."""
        return self.tokens / (self.rows * (sequence_length + 1))


@dataclass(frozen=True)
class PackManifest:
    """The content of `PREFIX.sft.json`."""

    settings: PackSettings
    tokenizer: TokenizerInfo
    sources: list[Source]
    counts: PackCounts
    efficiency: float
    """The share of the rows' places that hold a token."""
    loss_mask: str
    """How it was found: generation spans, prefixes, or response."""
    checksums: dict[str, str]
    """Of "bin", "idx" and "sft": "sha256:" and the digest."""
    command: list[str]
    tokenizer_checksums: dict[str, str] = field(default_factory=dict)
    """The same of the files in `PREFIX.tokenizer`, by name; none where an earlier version packed, which made no such
    folder."""
    end_of_turn_ids: list[int] = field(default_factory=list)
    """The special tokens that end a learned turn, the most frequent first; none where an earlier version packed."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables that the chat template was given for all conversations."""

    @staticmethod
    def tokenizer_path(prefix: str | Path) -> Path:
        """Where the packed index `prefix` keeps its tokenizer."""
        return Path(f"{prefix}.tokenizer")

    @staticmethod
    def path(prefix: str | Path) -> Path:
        """Where the manifest of the packed index `prefix` is."""
        return Path(f"{prefix}.sft.json")

    @classmethod
    def read(cls, prefix: str | Path) -> "PackManifest":
        """Read `PREFIX.sft.json`. Raises UserError when it is not there or not of a known version."""
        path = cls.path(prefix)
        try:
            content = read_json(path)
            if (version := content.pop("format_version")) != FORMAT_VERSION:
                raise UserError(f"{path}: version {version!r}, this program knows {FORMAT_VERSION}; pack again")
            settings = content.pop("settings")
            return cls(
                settings=PackSettings(
                    **{
                        **settings,
                        "columns": tuple(settings["columns"]),
                        "ignore_fields": tuple(settings.get("ignore_fields", ())),
                    }
                ),
                tokenizer=TokenizerInfo(**content.pop("tokenizer")),
                sources=[Source(**source) for source in content.pop("sources")],
                counts=PackCounts(**content.pop("counts")),
                **content,
            )
        except FileNotFoundError:
            raise UserError(f"{path}: no such packed index; make it with tools/pack_sft.py --output {prefix}") from None
        except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not readable as the manifest of a packed index ({error}); pack again") from error

    def require(self, prefix: str | Path, fingerprint: str, sequence_length: int) -> None:
        """Raise UserError unless the index was packed with this tokenizer and for this length."""
        if fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"{prefix}: packed with another tokenizer (that of {self.tokenizer.path}): fine-tune with that one "
                f"(data.tokenizer), or pack again with yours"
            )
        if sequence_length != self.settings.sequence_length:
            raise UserError(
                f"{prefix}: packed for training.sequence_length={self.settings.sequence_length}, not "
                f"{sequence_length}: change it, or pack again with --sequence-length {sequence_length}"
            )

    def write(self, prefix: str | Path) -> None:
        """Write `PREFIX.sft.json`, whole or not at all."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_json(self.path(prefix), content, indent=1)


def is_packed(paths: Iterable[Path]) -> bool:
    """Whether these are prefixes of packed indices, rather than files of examples. Raises UserError for a mixture."""
    packed = [PackManifest.path(path).exists() for path in paths]
    if any(packed) and not all(packed):
        raise UserError(
            "data.train mixes packed indices with other files: pack these too (tools/pack_sft.py), or omit them"
        )
    return any(packed)


def write_boundaries(path: Path, row_bounds: numpy.ndarray, run_bounds: numpy.ndarray, runs: numpy.ndarray) -> None:
    """Write a `.sft` file: where rows begin among the examples, examples among the runs, and the runs' lengths."""
    with open(path, "wb", opener=no_links) as file:
        file.write(_HEADER.pack(_MAGIC, FORMAT_VERSION, len(row_bounds) - 1, len(run_bounds) - 1, len(runs)))
        for array, dtype in ((row_bounds, "<i8"), (run_bounds, "<i8"), (runs, "<i4")):
            file.write(array.astype(dtype).tobytes())


class PackedIndex:
    """The rows of a packed index, mapped and only read on access: `index[i]` is a list of examples.

    Raises UserError when files are missing, do not fit together, or are not those that were packed: of all but `.bin`,
    the checksums are compared.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = prefix
        self.manifest = PackManifest.read(prefix)
        self._index = IndexReader(prefix)
        path = Path(f"{prefix}.sft")
        header = path.open("rb").read(_HEADER.size) if path.is_file() else b""
        if len(header) < _HEADER.size or _HEADER.unpack(header)[:2] != (_MAGIC, FORMAT_VERSION):
            raise UserError(f"{path}: missing or damaged; pack again")
        _, _, num_rows, num_examples, num_runs = _HEADER.unpack(header)
        ends = _HEADER.size + numpy.cumsum([0, 8 * (num_rows + 1), 8 * (num_examples + 1), 4 * num_runs])
        if path.stat().st_size != ends[-1]:
            raise UserError(f"{path}: damaged: its length does not fit its counts; pack again")
        data = numpy.memmap(path, mode="r")
        self._row_bounds: Any = data[ends[0] : ends[1]].view("<i8")
        self._run_bounds: Any = data[ends[1] : ends[2]].view("<i8")
        self._runs: Any = data[ends[2] : ends[3]].view("<i4")
        self._check(path)

    def _check(self, path: Path) -> None:
        """Raise UserError unless rows, examples and runs cover each other and the tokens."""
        check_structure(self._index)
        counts, lengths = self.manifest.counts, self._index.document_lengths()
        fits = (
            (counts.rows, counts.examples, counts.tokens)
            == (len(self._row_bounds) - 1, len(self._run_bounds) - 1, self._index.num_tokens)
            and len(lengths) == counts.rows
            and lengths.max(initial=0) <= self.manifest.settings.sequence_length + 1
            and all(
                bounds[0] == 0 and bounds[-1] == end and (numpy.diff(bounds) > 0).all()
                for bounds, end in ((self._row_bounds, counts.examples), (self._run_bounds, len(self._runs)))
            )
        )
        if fits:
            run_ends = numpy.concatenate([[0], numpy.cumsum(self._runs, dtype=numpy.int64)])
            fits = self._runs.min(initial=0) >= 0 and numpy.array_equal(
                numpy.diff(run_ends[self._run_bounds[self._row_bounds]]), lengths
            )
        if not fits:
            raise UserError(f"{path}: damaged: it does not fit {self.prefix}.idx and the manifest; pack again")
        self._verify("idx", "sft")

    def __len__(self) -> int:
        return len(self._row_bounds) - 1

    def __getitem__(self, row: int) -> list[Example]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        tokens = self._index.document(row)
        examples, begin = [], 0
        for number in range(self._row_bounds[row], self._row_bounds[row + 1]):
            runs = self._runs[self._run_bounds[number] : self._run_bounds[number + 1]]
            has_loss = numpy.repeat(numpy.arange(len(runs)) % 2 == 1, runs)
            examples.append(Example(tokens[begin : begin + len(has_loss)], has_loss))
            begin += len(has_loss)
        return examples

    def first_difference_of_masks(self, other: "PackedIndex") -> int | None:
        """The first row whose examples end elsewhere, or are learned in other parts, than in an index of the same
        tokens; None when there is none."""
        if all(
            numpy.array_equal(ours, theirs)
            for ours, theirs in (
                (self._row_bounds, other._row_bounds),
                (self._run_bounds, other._run_bounds),
                (self._runs, other._runs),
            )
        ):
            return None
        return next(
            row
            for row in range(len(self))
            if [one.has_loss.tolist() for one in self[row]] != [one.has_loss.tolist() for one in other[row]]
        )

    def verify(self) -> None:
        """Read everything and raise UserError unless all checksums are the manifest's."""
        self._verify("bin", "idx", "sft")

    def _verify(self, *kinds: str) -> None:
        """Compare the checksums of some of the files, and of those of the tokenizer."""
        folder, checksums = PackManifest.tokenizer_path(self.prefix), self.manifest.checksums
        expected = {Path(f"{self.prefix}.{kind}"): checksums[kind] for kind in kinds if kind in checksums}
        expected |= {folder / name: checksum for name, checksum in self.manifest.tokenizer_checksums.items()}
        for path, checksum in expected.items():
            if not path.is_file():
                raise UserError(f"{path}: missing; pack again")
            if file_checksum(path) != checksum:
                raise UserError(f"{path}: damaged: its checksum is not the manifest's; pack again")
