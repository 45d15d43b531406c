"""Tokenizers and documents for the indexing tests, made on the spot."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from indexing_inputs import generated_text

from megatron_tpt.indexing.options import TrainTokenizerOptions
from megatron_tpt.indexing.train_tokenizer import train_tokenizer
from megatron_tpt.records import Record, write_records


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 generated documents, every third with thinking."""
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    rng = random.Random(0)

    def records() -> Iterator[Record]:
        for i in range(2000):
            thinking = generated_text(-i - 1, rng.randint(1, 60)) if i % 3 == 0 else None
            yield Record(f"doc-{i}", generated_text(i, rng.randint(1, 80)), thinking)

    write_records(path, records())
    return path


@pytest.fixture(scope="session")
def tokenizer_dir(documents: Path) -> Path:
    """A byte-level BPE tokenizer with think tags among its tokens."""
    options = TrainTokenizerOptions(input=[documents], output=documents.parent / "tokenizer", vocab_size=1000)
    return train_tokenizer(options)


@pytest.fixture(scope="session")
def word_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole words of more than 65,500 kinds, special tokens found in the vocabulary like any word; no unknown."""
    folder = tmp_path_factory.mktemp("words")
    words = ["<eos>", "<think>", "</think>", "<", "think>", "/think>", "eos>", "a", "b", "c", "d"]
    vocabulary = {word: id for id, word in enumerate([*words, *(f"w{i}" for i in range(66_000))])}
    content = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 0,
                "content": "<eos>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    return folder
