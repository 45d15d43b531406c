"""Indexed random words with thinking, and a small recipe that trains on them, for the benchmarks of training."""

import platform
import random
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.options import IndexOptions, TrainTokenizerOptions
from megatron_tpt.indexing.train_tokenizer import train_tokenizer
from megatron_tpt.recipes.pretrain import PretrainRecipe
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


def make_recipe(
    folder: Path, *, hidden_size: int, num_layers: int, sequence_length: int, num_steps: int, **sections: dict[str, Any]
) -> PretrainRecipe:
    """A run in `folder` of a small model, two micro-batches of two samples a step."""
    return recipe_from_dict(
        PretrainRecipe,
        {
            "run": {"output_dir": str(folder / "run")},
            "model": {
                "num_layers": num_layers,
                "hidden_size": hidden_size,
                "ffn_hidden_size": 3 * hidden_size,
                "vocab_size": VOCAB_SIZE,
            },
            "training": {
                "num_steps": num_steps,
                "dtype": "float32",
                "sequence_length": sequence_length,
                "global_batch_size": 4,
                "micro_batch_size": 2,
            },
            "logging": {"tensorboard": False},
            **sections,
        },
    )


def measured_on() -> dict[str, dict[str, str]]:
    """The software and the machine, as the figures name them."""
    return {
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
    }
