"""Rows of new tokens do not depend on the layout."""

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from training_runs import FINETUNE, Train

from megatron_tpt.interop.checkpoint_reader import CheckpointReader


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens_are_the_same_under_every_layout(
    tied: bool, train: Train, recipe: dict, tokenizer_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(tokenizer_path, tmp_path / "grown")
    backend = Backend.from_file(str(tmp_path / "grown" / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(f"<|tool_{i}|>", special=True) for i in range(100)])
    backend.save(str(tmp_path / "grown" / "tokenizer.json"))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "ban", "response": "ke"}\n')
    train("base", "--training.num_steps=3", f"--model.tie_embeddings={str(tied).lower()}")
    training = {**recipe["training"], "num_steps": 1, "init_from": str(tmp_path / "base" / "checkpoints" / "latest")}
    changes = {
        "model": {},
        "training": {**training, "allow_other_tokenizer": True},
        "data": {"train": str(tmp_path / "pairs.jsonl"), "tokenizer": str(tmp_path / "grown")},
        "optimizer": {"learning_rate": 1e-30, "min_learning_rate": 0.0},
    }
    layouts = {"one": 1, "tp": 2, "pp": 2}
    sizes = {"tp": ["--parallel.tensor_parallel_size=2"], "pp": ["--parallel.pipeline_parallel_size=2"]}
    for name, num_processes in layouts.items():
        train(name, *sizes.get(name, []), num_processes=num_processes, program=FINETUNE, changes=changes)
    for key in ["embedding.word_embeddings.weight"] + ["output_layer.weight"] * (not tied):
        one, *others = (CheckpointReader(tmp_path / name / "checkpoints" / "latest").read(key) for name in layouts)
        torch.testing.assert_close(one[320:420], one[:320].mean(dim=0).expand(100, -1))
        for other in others:
            torch.testing.assert_close(other, one)
