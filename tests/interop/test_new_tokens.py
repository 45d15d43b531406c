"""Rows of tokens that the weights do not know, and the context that an export claims."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from chains import FINETUNE, SHAPE, base_tokenizer, train
from transformers import AutoTokenizer

from megatron_tpt.config.load import load_recipe
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.errors import UserError
from megatron_tpt.interop.checkpoint_reader import CheckpointReader
from megatron_tpt.interop.hf_export import export_hf
from megatron_tpt.interop.options import ExportOptions
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.program import prepare

TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


@pytest.fixture
def pairs(tmp_path: Path) -> dict:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    return {"train": str(tmp_path / "pairs.jsonl")}


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """The tokenizer with 100 more tokens than the base model's, beyond the padding of its embedding."""
    tokenizer = AutoTokenizer.from_pretrained(base_tokenizer(tmp_path / "tokenizer"))
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|tool_{i}|>" for i in range(100)]})
    tokenizer.save_pretrained(tmp_path / "grown")
    return tmp_path / "grown"


@pytest.mark.parametrize("choice", ["mean", "keep"])
def test_new_tokens_start_at_the_mean_of_the_others(
    choice: str,
    pairs: dict,
    grown: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    data = {**pairs, "tokenizer": str(tmp_path / "tokenizer")}
    base = train(monkeypatch, FINETUNE, tmp_path / "base", 1, model=SHAPE, data=data)
    start = {"init_from": str(base), "allow_other_tokenizer": True, "new_token_rows": choice}
    still = {"optimizer": {"learning_rate": 1e-30, "min_learning_rate": 0.0}}
    data = {**pairs, "tokenizer": str(grown)}
    tuned = train(monkeypatch, FINETUNE, tmp_path / "tuned", 1, training=start, data=data, **still)
    num_known = len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    assert yaml.safe_load((tuned / "recipe.yaml").read_text())["model"]["vocab_size"] == num_known + 100
    for name in TABLES:
        before, after = CheckpointReader(base).read(name), CheckpointReader(tuned).read(name)
        assert len(after) == len(before) + 128
        torch.testing.assert_close(after[:num_known], before[:num_known])
        mean = before[:num_known].mean(dim=0)
        assert mean.norm() > 1e-3
        if choice == "mean":
            torch.testing.assert_close(after[num_known : num_known + 100], mean.expand(100, -1))
        else:
            torch.testing.assert_close(after[num_known : len(before)], before[num_known:])
            assert after[len(before) :].abs().max() < 1e-20  # an update of the learning rate's size
    assert f"100 tokens that {base.resolve()} lacks (<|tool_0|>, " in capsys.readouterr().out
    export_hf(ExportOptions(tuned, tmp_path / "hf"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == num_known + 100


def test_sequences_beyond_the_context_are_warned_of_and_exported(
    pairs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = base_tokenizer(tmp_path / "tokenizer")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 48}))
    data = {**pairs, "tokenizer": str(tokenizer)}
    model = {**SHAPE, "max_position_embeddings": 48, "rotary_base": 500000.0}
    long = train(monkeypatch, FINETUNE, tmp_path / "long", 1, model=model, data=data, training={"sequence_length": 96})
    assert "training.sequence_length=96 is above model.max_position_embeddings=48" in capsys.readouterr().out
    # A short run after a long one does not make the model forget: the longest of the chain counts.
    short = {"sequence_length": 32, "init_from": str(long)}
    last = train(monkeypatch, FINETUNE, tmp_path / "short", 1, data=data, training=short)
    assert "is above" not in capsys.readouterr().out
    export_hf(ExportOptions(last, tmp_path / "hf"))
    assert "max_position_embeddings is 96" in capsys.readouterr().out
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 96
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").model_max_length == 96
    assert config["rope_parameters"] == {"rope_theta": 500000.0, "rope_type": "default"}
    assert config["rope_theta"] == 500000.0


def test_a_dry_run_warns_of_the_context_too(pairs: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "recipe.yaml"
    data = {**pairs, "tokenizer": str(base_tokenizer(tmp_path / "tokenizer"))}
    path.write_text(yaml.safe_dump({"data": data, "training": {"num_steps": 1, "sequence_length": 64}}))
    for context, warns in ((63, True), (64, False)):
        prepare(*load_recipe(FinetuneRecipe, [str(path), f"--model.max_position_embeddings={context}", "--dry-run"]))
        assert ("is above model.max_position_embeddings" in capsys.readouterr().out) == warns


def test_a_context_is_stretched_only_by_settings_that_go_together() -> None:
    stretched = ModelConfig(rope_scaling_type="yarn", rope_scaling_factor=4.0, rope_beta_fast=16.0)
    for change, word in (
        ({"rope_scaling_factor": None}, "rope_beta_fast has no effect"),
        ({"rope_scaling_type": "linear"}, "rope_beta_fast has no effect"),
        ({"rope_low_freq_factor": 2.0}, "rope_low_freq_factor has no effect"),
        ({"rope_scaling_factor": -1.0}, "must be above 0"),
    ):
        with pytest.raises(UserError, match=word):
            dataclasses.replace(stretched, **change)
