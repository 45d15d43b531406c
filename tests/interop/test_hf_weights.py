"""Hugging Face models and checkpoints compute the same, and nothing is lost on the way there and back."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hf_models import (
    ALL_CONFIGS,
    CONFIGS,
    VOCAB_SIZE,
    assert_same_weights,
    hf_logits,
    hf_weights,
    megatron_greedy,
    megatron_logits,
    save_hf_model,
    some_tokens,
)
from safetensors.torch import save_file

from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.interop.hf_export import export_hf, read_model_config, write_safetensors
from megatron_tpt.interop.hf_import import import_hf
from megatron_tpt.interop.options import ExportOptions, ImportOptions

HERE = Path(__file__).parent
Folders = Callable[[str], Path]


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_imported_model_has_the_logits_of_transformers(name: str, hf_folder: Folders, imported: Folders) -> None:
    tokens = some_tokens()
    expected = hf_logits(hf_folder(name), tokens)
    difference = (megatron_logits(imported(name), tokens) - expected).abs().max().item()
    print(f"{name}: largest logit {expected.abs().max():.2f}, largest difference {difference:.2e}")
    assert difference < 1e-4


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_import_then_export_gives_back_every_bit(
    name: str, hf_folder: Folders, imported: Folders, tmp_path: Path
) -> None:
    export_hf(ExportOptions(imported(name), tmp_path / "back"))
    assert_same_weights(tmp_path / "back", hf_folder(name))
    exported, original = (transformers.AutoConfig.from_pretrained(f) for f in (tmp_path / "back", hf_folder(name)))
    for field in (*json.loads((tmp_path / "back" / "config.json").read_text()), "rope_parameters"):
        if field == "eos_token_id" and original.eos_token_id is None:
            assert exported.eos_token_id == Tokenizer(hf_folder(name)).eos_id
        elif field != "torch_dtype":
            assert getattr(exported, field, None) == getattr(original, field, None), field
    tokens = some_tokens(1, 32)
    assert torch.equal(hf_logits(tmp_path / "back", tokens), hf_logits(hf_folder(name), tokens))


@pytest.mark.parametrize("tensor_parallel, pipeline_parallel", [("2", "1"), ("1", "2")])
def test_export_does_not_depend_on_the_layout_that_wrote_the_checkpoint(
    tensor_parallel: str, pipeline_parallel: str, hf_folder: Folders, imported: Folders, tmp_path: Path
) -> None:
    names = ("qwen2", "qwen3-tied", "llama-biases-linear")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [HERE / "layout_worker.py", tensor_parallel, pipeline_parallel, tmp_path, *map(imported, names)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for name in names:
        export_hf(ExportOptions(tmp_path / f"{name}-checkpoint" / "latest", tmp_path / name))
        assert_same_weights(tmp_path / name, hf_folder(name))


@pytest.mark.slow(minutes=1)
def test_vllm_and_megatron_choose_the_same_tokens(imported: Folders, tmp_path: Path) -> None:
    num_new_tokens = 24
    prompts = some_tokens(num_rows=20, length=12)
    for name in CONFIGS:
        export_hf(ExportOptions(imported(name), tmp_path / name))
    command = [sys.executable, HERE / "vllm_worker.py", str(num_new_tokens), *(tmp_path / name for name in CONFIGS)]
    result = subprocess.run(command, input=json.dumps(prompts.tolist()), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, generated in zip(CONFIGS, json.loads(result.stdout.splitlines()[-1]), strict=True):
        expected, lead = megatron_greedy(imported(name), prompts, num_new_tokens)
        print(f"{name}: smallest lead of a chosen token's logit {lead:.2e}")
        ends = {Tokenizer(tmp_path / name).eos_id, exported_end(tmp_path / name)}
        assert generated == [until_end(row, ends) for row in expected.tolist()], name


def exported_end(folder: Path) -> int:
    end: int = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return end


def until_end(row: list[int], ends: set[int]) -> list[int]:
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)


def test_models_in_several_files_are_read_and_written(tokenizer: Path, hf_folder: Folders, tmp_path: Path) -> None:
    save_hf_model("llama", tmp_path / "sharded", tokenizer, max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    import_hf(ImportOptions(tmp_path / "sharded", tmp_path / "checkpoint"))
    export_hf(ExportOptions(tmp_path / "checkpoint", tmp_path / "one_file"))
    assert_same_weights(tmp_path / "one_file", hf_folder("llama"))

    (tmp_path / "one_file" / "model.safetensors").unlink()
    write_safetensors(tmp_path / "one_file", hf_weights(hf_folder("llama")).items(), max_file_bytes=100_000)
    assert len(list((tmp_path / "one_file").glob("model-*-of-*.safetensors"))) > 2
    assert_same_weights(tmp_path / "one_file", hf_folder("llama"))
    tokens = some_tokens(1, 32)
    assert torch.equal(hf_logits(tmp_path / "one_file", tokens), hf_logits(hf_folder("llama"), tokens))


def test_bf16_weights_stay_bf16_and_can_be_exported_in_fp32(tokenizer: Path, tmp_path: Path) -> None:
    source = save_hf_model("qwen2", tmp_path / "bf16", tokenizer, dtype=torch.bfloat16)
    import_hf(ImportOptions(source, tmp_path / "checkpoint"))
    export_hf(ExportOptions(tmp_path / "checkpoint", tmp_path / "as_stored"))
    assert_same_weights(tmp_path / "as_stored", source)
    export_hf(ExportOptions(tmp_path / "checkpoint", tmp_path / "fp32", dtype="float32"))
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["torch_dtype"] == "float32"
    weights = hf_weights(source)
    assert all(torch.equal(tensor, weights[name].float()) for name, tensor in hf_weights(tmp_path / "fp32").items())
    tokens = some_tokens(1, 64)
    assert (megatron_logits(tmp_path / "checkpoint", tokens) - hf_logits(source, tokens)).abs().max() < 1e-4


def test_import_keeps_the_shape_of_the_model_and_only_the_tokenizers_files(
    hf_folder: Folders, imported: Folders
) -> None:
    checkpoint = imported("llama3-scaled-tied")
    model = read_model_config(checkpoint)
    assert (model.vocab_size, model.padded_vocab_size) == (VOCAB_SIZE, 384)
    assert (model.rotary_base, model.rope_scaling_factor, model.head_dim) == (500000.0, 32.0, 64)
    assert model.tie_embeddings
    kept = {path.name for path in (checkpoint / "tokenizer").iterdir()}
    assert "tokenizer.json" in kept
    assert not kept & {"model.safetensors", "config.json"}
    assert Tokenizer(checkpoint / "tokenizer").fingerprint == Tokenizer(hf_folder("llama3-scaled-tied")).fingerprint


@pytest.mark.parametrize("spoil", ["other_output", "same_output", "no_embedding"])
def test_embeddings_are_tied_where_transformers_ties_them(
    spoil: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_hf_model("qwen3-tied", tmp_path / "model", tokenizer)
    weights = hf_weights(folder)
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding * 0.5 if spoil == "other_output" else embedding.clone()
    if spoil == "no_embedding":
        del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    import_hf(ImportOptions(folder, tmp_path / "checkpoint"))
    said = capsys.readouterr().out
    assert ("not tied" in said, "is missing" in said) == (spoil == "other_output", spoil == "no_embedding")
    export_hf(ExportOptions(tmp_path / "checkpoint", tmp_path / "back"))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (spoil != "other_output")
    tokens = some_tokens(1, 32)
    expected = hf_logits(folder, tokens)
    assert torch.equal(hf_logits(tmp_path / "back", tokens), expected)
    assert (megatron_logits(tmp_path / "checkpoint", tokens) - expected).abs().max() < 1e-4
