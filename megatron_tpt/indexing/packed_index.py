"""How packed rows are stored.

A packed index is an indexed dataset like any other, `PREFIX.bin` and `PREFIX.idx`, whose documents are the rows: the
examples of a row one after the other, without padding. `PREFIX.sft` says where the examples are and what of them is
learned (little-endian):

    8 bytes  "SFTROWS\\0"    8 bytes  version, 1    8 bytes each  number of rows, examples, runs
    int64    first example of each row, and the number of examples at the end
    int64    first run of each example, and the number of runs at the end
    int32    length of each run, in tokens: of an example without loss, with loss, without loss, ... in turn

`PREFIX.tokenizer/` is the tokenizer, with the chat template that was used. `PREFIX.sft.json` is the manifest
(pack_manifest.py).
"""

import struct
from pathlib import Path
from typing import Any

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.files import file_checksum, no_links
from megatron_tpt.indexing.conversations import Example
from megatron_tpt.indexing.pack_manifest import FORMAT_VERSION, PackManifest
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.verification import check_structure

_MAGIC = b"SFTROWS\0"
_HEADER = struct.Struct("<8sQQQQ")


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

    def __reduce__(self) -> tuple[type["PackedIndex"], tuple[str | Path]]:
        return PackedIndex, (self.prefix,)  # maps its files again

    def __len__(self) -> int:
        return len(self._row_bounds) - 1

    def learned(self, row: int) -> numpy.ndarray:
        """Which tokens of a row are learned, bool [tokens]; not the first of an example, which nothing predicts."""
        masks = [example.has_loss.copy() for example in self[row]]
        for mask in masks:
            mask[0] = False
        return numpy.concatenate(masks)

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
