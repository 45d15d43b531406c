"""A small indexed corpus with thinking, and runs of the real training programs on it."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from training_runs import PRETRAIN, Train, Workers, read_metrics

from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.options import IndexOptions, TrainTokenizerOptions
from megatron_tpt.indexing.train_tokenizer import train_tokenizer
from megatron_tpt.records import Record, write_records

WORDS = [first + second for first in ("ba", "ke", "lo", "mi", "su") for second in ("n", "rt", "sh", "ga", "le")]


def sentence(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(num_words)) + "."


@pytest.fixture(scope="session")
def records_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents, two of three with thinking, some thoughts longer than a training sample."""
    rng = random.Random(0)

    def records() -> Iterator[Record]:
        for i in range(300):
            thinking = sentence(rng, rng.randint(3, 80)) if i % 3 else None
            yield Record(f"doc-{i}", sentence(rng, rng.randint(5, 30)), thinking)

    path = tmp_path_factory.mktemp("corpus") / "records.jsonl"
    write_records(path, records())
    return path


@pytest.fixture(scope="session")
def tokenizer_path(records_path: Path) -> Path:
    return train_tokenizer(
        TrainTokenizerOptions(input=[records_path], output=records_path.parent / "tokenizer", vocab_size=320)
    )


@pytest.fixture(scope="session")
def index_prefix(records_path: Path, tokenizer_path: Path) -> Path:
    prefix = records_path.parent / "corpus"
    index(IndexOptions(input=[records_path], tokenizer=tokenizer_path, output=prefix))
    return prefix


@pytest.fixture(scope="session")
def recipe(index_prefix: Path) -> dict:
    """A pre-training recipe of 20 steps, as YAML would give it."""
    return {
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_query_groups": 2},
        "training": {
            "num_steps": 20,
            "dtype": "float32",
            "sequence_length": 32,
            "global_batch_size": 8,
            "micro_batch_size": 2,
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "logging": {"log_interval": 1, "tensorboard": False},
        "data": {"train": str(index_prefix)},
    }


@pytest.fixture(scope="session")
def examples_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 questions with their answers, most with thinking."""
    path = tmp_path_factory.mktemp("sft") / "examples.jsonl"
    with path.open("w") as file:
        for i in range(40):
            response = f"<think>\nban kert {'losh ' * (i % 7)}\n</think>\nmiga{i}"
            file.write(json.dumps({"prompt": f"sule {i} ?\n", "response": response}) + "\n")
    return path


@pytest.fixture(scope="session")
def workers() -> Workers:
    return Workers()


@pytest.fixture
def train(recipe: dict, tmp_path: Path, workers: Workers) -> Train:
    """train(name, *overrides, num_processes=..., program=..., changes=...) runs the recipe in a run folder of that name
    and returns its metrics, one dictionary per step."""

    def run(
        name: str, *overrides: str, changes: dict | None = None, num_processes: int = 1, program: str = PRETRAIN
    ) -> list[dict]:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**recipe, **(changes or {}), "run": {"output_dir": str(tmp_path / name)}}))
        workers.run(program, [str(path), *overrides], num_processes)
        return read_metrics(tmp_path / name)

    return run
