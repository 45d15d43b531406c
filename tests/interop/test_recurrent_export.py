"""Exports of recurrent models: transformers computes what Megatron Core does, at any depth, cached or not."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import assert_same_weights, some_tokens
from recurrent_exports import checkpoint_of, loaded, padded
from test_retrofit import PARENTS, built, logits_of

from megatron_tpt import platform
from megatron_tpt.config.load import read_yaml
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.interop.hf_config import from_hf_config, to_hf_config
from megatron_tpt.interop.hf_export import export_hf, read_model_config
from megatron_tpt.interop.hf_import import import_hf
from megatron_tpt.interop.options import ExportOptions, ImportOptions
from megatron_tpt.models.recurrent.config import RecurrentConfig


@pytest.mark.parametrize("parent", PARENTS)
@torch.no_grad()
def test_logits_equal_those_of_megatron_core(parent: str, exported: Callable[[str], Path]) -> None:
    folder, tokens = exported(parent), some_tokens(2, 64)
    model = loaded(folder)
    with platform.process_groups(ParallelConfig()):
        gpt = built(checkpoint_of(folder), TrainingConfig(dtype="float32")).eval()
        for recurrences in (1, 2, 5):
            expected = logits_of(gpt, tokens, recurrences=recurrences, backprop=0, seed=0)
            found = model(tokens, num_recurrences=recurrences).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(model(tokens).logits, expected, atol=1e-2)  # four iterations: the depth matters
        torch.testing.assert_close(model(tokens).logits, logits_of(gpt, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parent", ["llama", "olmo2"])
@torch.no_grad()
def test_greedy_tokens_are_the_same_with_and_without_cache(parent: str, exported: Callable[[str], Path]) -> None:
    """In a batch of prompts of different lengths as one by one, prompts in pieces, and in validation of training."""
    model, prompts = loaded(exported(parent)), [some_tokens(1, length) for length in (3, 17, 40)]
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for recurrences in (1, 3):
        arguments = {**settings, "num_recurrences": recurrences}
        alone = [model.generate(prompt, **arguments)[0, prompt.shape[1] :] for prompt in prompts]
        without = [model.generate(prompt, use_cache=False, **arguments)[0, prompt.shape[1] :] for prompt in prompts]
        assert all(torch.equal(*pair) for pair in zip(alone, without, strict=True))
        batch, mask = padded(prompts)
        together = model.generate(batch, attention_mask=mask, **arguments)[:, batch.shape[1] :]
        assert torch.equal(together, torch.stack(alone))
        pieces = model.generate(prompts[2], prefill_chunk_size=16, **arguments)[0, prompts[2].shape[1] :]
        assert torch.equal(pieces, alone[2])
        with platform.process_groups(ParallelConfig()):
            gpt = built(checkpoint_of(exported(parent)), TrainingConfig(dtype="float32")).eval()
            whole = torch.cat((prompts[2], alone[2][None]), dim=1)
            logits = logits_of(gpt, whole, recurrences=recurrences, backprop=0, seed=0)
        assert torch.equal(logits[0, prompts[2].shape[1] - 1 : -1].argmax(-1), alone[2])


def test_a_cache_holds_the_keys_of_every_iteration(exported: Callable[[str], Path]) -> None:
    model, tokens = loaded(exported("llama")), some_tokens(1, 8)
    cache = model(tokens, num_recurrences=3).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers] == [8] * (1 + 3 * 2 + 1)
    with pytest.raises(ValueError, match="filled with num_recurrences=3, and now it is 2"):
        model(tokens[:, :1], past_key_values=cache, num_recurrences=2)
    with pytest.raises(ValueError, match="StaticCache: a recurrent model needs a DynamicCache"):
        model.generate(tokens, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="num_recurrences=0 must be 1 or more"):
        model(tokens, num_recurrences=0)
    with pytest.raises(ValueError, match="output_hidden_states: not supported"):
        model(tokens, output_hidden_states=True)


LOAD = """
import json, sys, torch, transformers
folder, again = sys.argv[1:]
found = []
for source in (folder, again):
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad():
        found.append(model.eval()(torch.arange(24)[None], num_recurrences=2).logits.tolist())
    if source == folder:
        model.save_pretrained(again)
print(json.dumps({"ours": [name for name in sys.modules if name.startswith("megatron")], "logits": found}))
"""


def test_the_code_in_an_export_imports_nothing_else_of_this_package(exported: Callable[[str], Path]) -> None:
    folder, modules = exported("llama"), set[str]()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                modules.add("." * node.level + str(node.module))
            elif isinstance(node, ast.Import):
                modules |= {name.name for name in node.names}
    own = {module for module in modules if module.startswith((".", "megatron"))}
    assert own == {".configuration_recurrent_gpt", ".state"} and (folder / "state.py").is_file()


@pytest.mark.slow
def test_an_export_loads_by_the_code_in_it(exported: Callable[[str], Path], tmp_path: Path) -> None:
    """Where this package is not, and once more after transformers has saved it."""
    folder, again = exported("qwen3-tied"), tmp_path / "again"
    expected = loaded(folder)(torch.arange(24)[None], num_recurrences=2).logits.detach()
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD, folder, again], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["ours"] == []
    assert all(torch.equal(torch.tensor(logits), expected) for logits in found["logits"])
    assert_same_weights(again, folder)


@pytest.mark.parametrize("parent", PARENTS)
def test_an_export_is_imported_as_it_was(parent: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    folder = exported(parent)
    import_hf(ImportOptions(folder, tmp_path / "imported"))
    before, after = (read_yaml(one / "recipe.yaml")["model"] for one in (checkpoint_of(folder), tmp_path / "imported"))
    assert {name for name in before if before[name] != after[name]} <= {"test_recurrences", "head_dim"}
    export_hf(ExportOptions(tmp_path / "imported", tmp_path / "again"))
    assert_same_weights(tmp_path / "again", folder)
    assert (tmp_path / "again/config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_config_json_says_how_deep_the_model_is() -> None:
    model = RecurrentConfig(
        num_layers=7, prelude_layers=2, coda_layers=1, mean_recurrences=8, test_recurrences=16, state_std=0.02,
        vocab_size=300,
    )  # fmt: skip
    config = to_hf_config(model, dtype="float32", token_ids={}, original={"sliding_window": 9, "layer_types": ["x"]})
    assert (config["model_type"], config["parent_model_type"]) == ("recurrent_gpt", "llama")
    assert [config[f"num_{part}_layers"] for part in ("prelude", "block", "coda", "hidden")] == [2, 4, 1, 7]
    assert (config["num_recurrences"], config["mean_recurrences"], config["initial_state_std"]) == (16, 8, 0.02)
    assert not {"sliding_window", "layer_types"} & config.keys()
    assert from_hf_config(config, Path("config.json")) == RecurrentConfig(
        **{**model.__dict__, "num_query_groups": 4, "head_dim": 16}
    )


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        ({"parent_model_type": "mixtral"}, "parent_model_type='mixtral' is not supported: use a model of llama, qwen2"),
        ({"num_block_layers": None}, "num_block_layers missing"),
        ({"num_coda_layers": 2}, "num_hidden_layers=3 is not the sum"),
        ({"initial_state_seed": 5}, "initial_state_seed=5 is not supported, only 0 is"),
        ({"model_type": "llama"}, "model_type='llama' is not that of RecurrentGPTForCausalLM"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 may change what the model computes"),
    ],
)
def test_what_does_not_fit_is_not_imported(change: dict[str, Any], reported: str) -> None:
    config = to_hf_config(RecurrentConfig(vocab_size=300), dtype="float32", token_ids={})
    with pytest.raises(UserError) as refusal:
        from_hf_config({**config, **change}, Path("config.json"))
    assert str(refusal.value).startswith(f"config.json: {reported}")


def test_another_precision_is_that_of_the_computation(exported: Callable[[str], Path], tmp_path: Path) -> None:
    """In bf16 the logits are near those of fp32."""
    checkpoint = checkpoint_of(exported("llama"))
    export_hf(ExportOptions(checkpoint, tmp_path / "bf16", dtype="bfloat16"))
    assert read_model_config(checkpoint).default_recurrences == 4
    tokens = some_tokens(1, 32)
    with torch.no_grad():
        expected = loaded(exported("llama"))(tokens).logits
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")(tokens).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.1 * expected.norm()
