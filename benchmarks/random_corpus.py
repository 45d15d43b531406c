"""Indexed random words with thinking, for the benchmarks of training."""

import random
from pathlib import Path

from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.options import IndexOptions, TrainTokenizerOptions
from megatron_tpt.indexing.train_tokenizer import train_tokenizer
from megatron_tpt.records import Record, write_records

VOCAB_SIZE = 512


def make_indices(folder: Path, num_files: int, *, num_documents: int) -> str:
    """Write `num_files` indices, each of `num_documents` documents of 120 words. Returns the path with a wildcard for
    all."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=5)) for _ in range(500)]
    tokenizer = folder / "tokenizer"
    for number in range(num_files):
        records = (
            Record(f"{number}-{i}", " ".join(draw.choices(words, k=60)), " ".join(draw.choices(words, k=60)))
            for i in range(num_documents)
        )
        path = folder / f"records-{number:04d}.jsonl"
        write_records(path, records)
        if number == 0:
            train_tokenizer(TrainTokenizerOptions(input=[path], output=tokenizer, vocab_size=VOCAB_SIZE))
        index(IndexOptions(input=[path], tokenizer=tokenizer, output=folder / f"corpus-{number:04d}"))
    return str(folder / "corpus-*")
