"""What cannot be converted is refused in one line, and leaves nothing behind."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hf_models import hf_weights
from safetensors.torch import save_file

from megatron_tpt.errors import UserError
from megatron_tpt.interop.hf_config import from_hf_config, to_hf_config
from megatron_tpt.interop.hf_export import export_hf
from megatron_tpt.interop.hf_import import import_hf
from megatron_tpt.interop.options import ExportOptions, ImportOptions
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.training.checkpoint_files import write_checksums

TOOLS = Path(__file__).parents[2] / "tools"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


@pytest.fixture
def model_folder(hf_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a model to spoil."""
    return Path(shutil.copytree(hf_folder("llama"), tmp_path / "model"))


def assert_refused(convert: Callable[[], None], output: Path, *words: str) -> None:
    before = set(output.parent.iterdir())
    with pytest.raises(UserError) as caught:
        convert()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert set(output.parent.iterdir()) == before


@pytest.mark.parametrize(
    "change, word",
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": None}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"architectures": ["Qwen2ForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"architectures": ["Qwen3ForCausalLM"], "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "mistral"}, "model_type"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"embedding_multiplier": 12}, "embedding_multiplier"),
        ({"scale_depth": 1.4}, "scale_depth"),
        ({"dim_model_base": 256}, "dim_model_base"),
        ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
        ({"num_experts": 8}, "num_experts"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}}, "longrope"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_our_models_lack_is_refused_by_name(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        from_hf_config({**CONFIG, **change}, Path("config.json"))


@pytest.mark.parametrize(
    "change",
    [
        {"attn_logit_softcapping": None},
        {"residual_multiplier": 1.0},
        {"embd_pdrop": 0.0},
        {"use_qk_norm": False},
        {"pretraining_tp": 1},
        {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": False},
        {"my_note": {"a": 1}, "unsloth_version": "2025.1", "training_run": 17},
        {"_attn_implementation": "eager", "use_flash_attn": True, "use_cache": False},
        {"temperature": 0.7, "pad_token_id": 3},
    ],
)
def test_fields_that_change_nothing_are_kept(change: dict[str, Any]) -> None:
    original = {**CONFIG, "head_dim": 16, "num_key_value_heads": 4, **change}
    model = from_hf_config(original, Path("config.json"))
    config = to_hf_config(model, dtype="float32", token_ids={}, original=original)
    assert {name: config[name] for name in change} == change
    back = from_hf_config(config, Path("config.json"))
    assert dataclasses.replace(back, head_dim=16) == model


def test_both_spellings_of_the_rope_settings_are_read() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = from_hf_config({**CONFIG, "rope_theta": 5e5, "rope_scaling": scaling}, Path("config.json"))
    new = from_hf_config({**CONFIG, "rope_parameters": {"rope_theta": 5e5, **scaling}}, Path("config.json"))
    assert old == new
    assert (new.rotary_base, new.rope_scaling_factor) == (5e5, 8.0)


def test_config_json_survives_the_way_there_and_back() -> None:
    biases = {"qkv_bias": True, "attention_output_bias": True}
    yarn = {"rope_scaling_type": "yarn", "rope_scaling_factor": 4.0, "rope_beta_fast": 16.0, "rope_truncate": False}
    for options in (
        {},
        {"qkv_bias": True},
        {"qk_norm": True, "head_dim": 48},
        {"rope_scaling_factor": 32.0},
        {"rope_scaling_factor": 8.0, "rope_low_freq_factor": 2.0, "rope_original_context": 4096},
        {"rope_scaling_type": "linear", "rope_scaling_factor": 2.5},
        yarn,
        {**yarn, "rope_attention_factor": 0.5},
        biases,
        {"mlp_bias": True},
        {**biases, "mlp_bias": True},
        {**biases, "qk_norm": True, "head_dim": 48},
    ):
        model = GPTConfig(vocab_size=300, num_query_groups=2, tie_embeddings=True, **options)
        config = to_hf_config(model, dtype="float32", token_ids={})
        back = from_hf_config(config, Path("config.json"))
        assert back.kv_channels == model.kv_channels
        assert dataclasses.replace(back, head_dim=model.head_dim) == model


@pytest.mark.parametrize(
    "options, word",
    [
        ({"qkv_bias": True, "qk_norm": True}, "qk_norm"),
        ({"attention_output_bias": True}, "attention_output_bias"),
        ({"mlp_bias": True, "qkv_bias": True}, "mlp_bias"),
        ({"qkv_bias": True, "head_dim": 32}, "head_dim"),
        ({"hidden_size": 66, "head_dim": 32}, "hidden_size"),
    ],
)
def test_models_without_a_hugging_face_counterpart_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        to_hf_config(GPTConfig(vocab_size=300, **options), dtype="float32", token_ids={})


def spoil_nothing_there(folder: Path) -> str:
    shutil.rmtree(folder)
    return "config.json"


def spoil_pickled_weights_only(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "safetensors"


def spoil_weights_missing(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "model.safetensors"


def spoil_weights_cut_off(folder: Path) -> str:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:1000])
    return "download the model again"


def spoil_tensor_missing(folder: Path) -> str:
    weights = hf_weights(folder)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    return "model.layers.1.mlp.up_proj.weight"


def spoil_tensor_too_many(folder: Path) -> str:
    weights = hf_weights(folder)
    weights["model.layers.0.self_attn.o_proj.bias"] = weights["model.norm.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    return "o_proj.bias"


def spoil_shape(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 90}))
    return "gate_proj.weight has shape"


def spoil_index_leads_elsewhere(folder: Path) -> str:
    index = {"weight_map": dict.fromkeys(hf_weights(folder), "../secret.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "weight_map"


def spoil_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json"


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_nothing_there,
        spoil_pickled_weights_only,
        spoil_weights_missing,
        spoil_weights_cut_off,
        spoil_tensor_missing,
        spoil_tensor_too_many,
        spoil_shape,
        spoil_index_leads_elsewhere,
        spoil_tokenizer,
    ],
)
def test_incomplete_models_are_not_imported(spoil: Callable[[Path], str], model_folder: Path) -> None:
    word = spoil(model_folder)
    output = model_folder.with_name("checkpoint")
    assert_refused(lambda: import_hf(ImportOptions(model_folder, output)), output, word)


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("vocab_size", "x"),
        ("num_hidden_layers", "y" * 100_000),
        ("hidden_size", [1]),
        ("num_key_value_heads", {}),
        ("initializer_range", [None]),
        ("rope_parameters", "\0"),
        ("rope_scaling", 7),
        ("architectures", 7),
        ("architectures", {"a": 1}),
        ("hidden_act", "y" * 100_000),
    ],
)
def test_fields_of_a_wrong_type_are_refused_in_a_short_line(name: str, new: Any, model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {name: new}))
    with pytest.raises(UserError, match=r"config\.json") as refusal:
        import_hf(ImportOptions(model_folder, model_folder.parent / "out"))
    assert len(str(refusal.value)) < 600 + len(str(model_folder))
    assert not (model_folder.parent / "out").exists()


def test_finished_folders_are_not_replaced(imported: Callable[[str], Path], model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "mine").touch()
    assert_refused(lambda: import_hf(ImportOptions(model_folder, output)), output, "exists already")
    assert_refused(lambda: export_hf(ExportOptions(imported("llama"), output)), output, "exists already")
    assert (output / "mine").exists()


def test_other_folders_are_not_exported(imported: Callable[[str], Path], model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert_refused(lambda: export_hf(ExportOptions(model_folder, output)), output, "is not a checkpoint")
    checkpoint = Path(shutil.copytree(imported("llama"), tmp_path / "checkpoint"))
    recipe = yaml.safe_load((checkpoint / "recipe.yaml").read_text())
    recipe["model"]["ffn_hidden_size"] = 90
    (checkpoint / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_checksums(checkpoint)
    assert_refused(lambda: export_hf(ExportOptions(checkpoint, output)), output, "linear_fc1.weight", "another")
    recipe["model"]["qk_norm"] = True
    (checkpoint / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_checksums(checkpoint)
    assert_refused(lambda: export_hf(ExportOptions(checkpoint, output)), output, "q_layernorm")


@pytest.mark.parametrize(
    "tool, arguments",
    [
        ("export_hf.py", ["--checkpoint", "nowhere", "--output", "out"]),
        ("import_hf.py", ["--model", "nowhere", "--output", "out"]),
    ],
)
def test_mistakes_end_the_tools_with_code_2(tool: str, arguments: list[str], tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, TOOLS / tool, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
