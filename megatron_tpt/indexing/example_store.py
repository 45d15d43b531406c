"""Examples on their way into a packed index: tokens in a file, the rest in memory, some 200 bytes per example."""

from array import array
from collections import Counter
from collections.abc import Set
from pathlib import Path
from typing import Self

import numpy

from megatron_tpt.files import file_checksum, no_links
from megatron_tpt.indexing.conversations import Example
from megatron_tpt.indexing.packed_index import write_boundaries
from megatron_tpt.indexing.packing import Packing
from megatron_tpt.indexing.writer import IndexWriter, token_dtype


class ExampleStore:
    """Examples in the order of the input: tokens in a file, lengths and runs of the loss mask in memory."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._path = path
        self._vocab_size = vocab_size
        self._dtype = numpy.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._file = open(path, "wb", buffering=1 << 20, opener=no_links)  # noqa: SIM115
        self._lengths, self._num_runs, self._runs = array("i"), array("i"), array("i")
        self.num_loss_tokens = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, example: Example) -> None:
        """Append an example."""
        self._file.write(example.tokens.astype(self._dtype).tobytes())
        changes = numpy.flatnonzero(numpy.diff(example.has_loss)) + 1  # the first token never has loss
        runs = numpy.diff(changes, prepend=0, append=len(example.tokens))
        self._lengths.append(len(example.tokens))
        self._num_runs.append(len(runs))
        self._runs.extend(runs.tolist())
        self.num_loss_tokens += int(example.has_loss.sum())

    def lengths(self) -> numpy.ndarray:
        """Tokens of each example, [n]."""
        return numpy.array(self._lengths, dtype=numpy.int64)

    def write_packed(self, packing: Packing, prefix: Path) -> dict[str, str]:
        """Write PREFIX.bin, .idx and .sft of the packed index and drop the store's own file. Returns the checksums."""
        self._file.flush()
        tokens = numpy.memmap(self._path, mode="r", dtype=self._dtype)
        ends = numpy.cumsum(self.lengths())
        begins = ends - self.lengths()
        writer = IndexWriter(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), self._vocab_size)
        with writer:
            for number in range(packing.num_rows):
                row = packing.row(number)
                writer.add_document(numpy.concatenate([tokens[begins[i] : ends[i]] for i in row]))
        num_runs, runs = (numpy.array(values, dtype=numpy.int64) for values in (self._num_runs, self._runs))
        packed_num_runs = num_runs[packing.order]
        run_bounds = numpy.concatenate([[0], numpy.cumsum(packed_num_runs)])
        # Where each run was, from where it is: its example's runs have moved together.
        moves = (numpy.cumsum(num_runs) - num_runs)[packing.order] - run_bounds[:-1]
        packed_runs = runs[numpy.arange(len(runs)) + numpy.repeat(moves, packed_num_runs)]
        boundaries = Path(f"{prefix}.sft")
        write_boundaries(boundaries, packing.bounds, run_bounds, packed_runs)
        self._path.unlink()
        return {**writer.checksums(), "sft": file_checksum(boundaries)}


class TurnEnds:
    """Which special tokens end the learned turns: at inference a model must stop at these."""

    def __init__(self, special_ids: Set[int]) -> None:
        self._special_ids = special_ids
        self._counts: Counter[int] = Counter()

    def add(self, example: Example) -> bool:
        """Count those of an example. Returns whether its last learned token is one: else it does not teach to stop."""
        is_last = example.has_loss & ~numpy.append(example.has_loss[1:], False)
        last_tokens = example.tokens[is_last].tolist()
        self._counts.update(token for token in last_tokens if token in self._special_ids)
        return last_tokens[-1] in self._special_ids

    def ids(self) -> list[int]:
        """The most frequent first; of equally frequent ones the smaller id."""
        return sorted(self._counts, key=lambda id: (-self._counts[id], id))
