"""Fine-tuning: the loss is on the response alone, and packed examples do not see each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import FINETUNE, Train

from megatron_tpt import platform
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.config.recipe import ParallelConfig, SftDataConfig, TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.models.gpt import build_model
from megatron_tpt.training.sft import Example, PackedExamples, pack, read_examples
from megatron_tpt.training.steps import _segment_mask


@pytest.fixture(scope="session")
def examples_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sft") / "examples.jsonl"
    with path.open("w") as file:
        for i in range(40):
            response = f"<think>\nban kert {'losh ' * (i % 7)}\n</think>\nmiga{i}"
            file.write(json.dumps({"prompt": f"sule {i} ?\n", "response": response}) + "\n")
    return path


@pytest.fixture(scope="session")
def examples(examples_path: Path, tokenizer_path: Path) -> list[Example]:
    return list(read_examples(SftDataConfig(train=[examples_path]), Tokenizer(tokenizer_path)))


def test_loss_is_on_the_response_and_its_end(examples: list[Example], tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    data = PackedExamples(examples, tokenizer, sequence_length=128, seed=0)
    responses = []
    for i in range(len(data.rows)):
        row = data[i]
        counted = row["labels"][row["loss_mask"] > 0].tolist()
        text = tokenizer.decode(counted)
        assert "?" not in text and "sule" not in text
        responses += [part for part in text.split("<|endoftext|>") if part]
        thinking = tokenizer.decode(row["labels"][row["is_thinking"] & (row["loss_mask"] > 0)].tolist())
        assert thinking.count("<think>") == thinking.count("</think>") == counted.count(tokenizer.eos_id)
        assert "miga" not in thinking
    assert len(responses) == len(examples)
    assert sorted(r.split("</think>\n")[1] for r in responses) == sorted(f"miga{i}" for i in range(40))


def test_every_epoch_holds_every_row_once_in_another_order(examples: list[Example], tokenizer_path: Path) -> None:
    data = PackedExamples(examples, Tokenizer(tokenizer_path), sequence_length=128, seed=0)
    n = len(data.rows)
    epochs = [[tuple(data[epoch * n + i]["tokens"].tolist()) for i in range(n)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == n
    assert epochs[0] != epochs[1]


def test_packing_fills_rows_and_loses_nothing() -> None:
    lengths = np.random.RandomState(0).randint(1, 100, size=500).tolist()
    rows = pack(lengths, 128)
    assert sorted(item for row in rows for item in row) == list(range(500))
    assert all(sum(lengths[item] for item in row) <= 128 for row in rows)
    assert len(rows) <= 1.1 * sum(lengths) / 128


def test_packed_examples_have_the_losses_that_they_have_alone(examples: list[Example], tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    row = PackedExamples(examples, tokenizer, sequence_length=128, seed=0)[0]
    num_segments = int(row["segment_ids"].max())
    assert num_segments > 2
    model_config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, ffn_hidden_size=64, init_std=0.2)
    with platform.process_groups(ParallelConfig()), torch.no_grad():
        platform.seed_everything(0)
        model = build_model(model_config, ParallelConfig(), TrainingConfig(dtype="fp32", sequence_length=128), seed=0)
        batch = {name: tensor[None] for name, tensor in row.items()}
        mask = _segment_mask(batch["segment_ids"])
        packed = model(batch["tokens"], batch["position_ids"], attention_mask=mask, labels=batch["labels"])[0]
        for segment in range(1, num_segments + 1):
            place = row["segment_ids"] == segment
            tokens, labels = row["tokens"][place][None], row["labels"][place][None]
            alone = model(tokens, row["position_ids"][place][None], attention_mask=None, labels=labels)[0]
            torch.testing.assert_close(packed[place], alone, rtol=1e-5, atol=1e-5)


def test_finetuning_starts_from_a_checkpoint_and_learns(
    train: Train, examples_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    train("base")
    checkpoint = tmp_path / "base/checkpoints/latest"
    changes = {
        "model": {},  # the checkpoint's
        "training": {
            "num_steps": 30,
            "dtype": "fp32",
            "sequence_length": 128,
            "global_batch_size": 4,
            "init_from": str(checkpoint),
        },
        "data": {"train": str(examples_path)},
    }
    metrics = train("tuned", program=FINETUNE, changes=changes)
    assert metrics[-1]["loss_answer"] < metrics[0]["loss_answer"] - 1
    assert metrics[-1]["loss_thinking"] < metrics[0]["loss_thinking"] - 1
    two = train("tuned2", "--parallel.tensor_parallel_size=2", program=FINETUNE, changes=changes, num_processes=2)
    assert [m["loss"] for m in two] == pytest.approx([m["loss"] for m in metrics], rel=1e-4)


@pytest.mark.parametrize("line", ["no json", '{"prompt": "p"}', '{"prompt": 1, "response": "r"}', "[1, 2]"])
def test_a_bad_line_is_named(line: str, tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "p", "response": "r"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:2: expected a JSON object"):
        list(read_examples(SftDataConfig(train=[path]), Tokenizer(tokenizer_path)))
