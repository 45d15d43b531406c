"""Recurrent models in vLLM: their tokens are those of transformers' layers, passed without any cache."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recurrent_reference import Unrolled
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, make_model, make_tokenizer, unchanged_environment

from megatron_tpt.errors import UserError
from megatron_tpt.generation import (
    EngineOptions,
    Sampling,
    VLLMEngine,
    check_context,
    complete,
    load_model_config,
    load_tokenizer,
    open_engine,
)
from megatron_tpt.generation.vllm_engine import CPU_ENVIRONMENT
from megatron_tpt.models.recurrent.state import initial_state

SPLIT = (1, 2, 1)  # prelude, block, coda
STD, SEED = 0.5, 7
CONTEXT, MAX_NUM_SEQS, BLOCK_TOKENS = 256, 4, 128
DEFAULT_DEPTH = 3
EOS = 0
NUM_NEW_TOKENS = 16
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": sum(SPLIT),
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": EOS,
    # Large weights, so that the choice of the next token is not a matter of rounding.
    "initializer_range": 0.3,
}
NOT_EXPORTED = {"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"}
PARENTS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_SHAPE),
    "qwen2": transformers.Qwen2Config(**_SHAPE),
    "qwen3": transformers.Qwen3Config(**_SHAPE, head_dim=64),
    "olmo2": transformers.Olmo2Config(**_SHAPE),
}


def random_ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist()


PROMPTS = [random_ids(length, length) for length in (1, 3, 40, 70, 150)]


class Exported:
    """A folder as the export writes it, and the same model made of transformers' layers."""

    def __init__(self, folder: Path, parent: str, seed: int = 0) -> None:
        config = PARENTS[parent]
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for key, parameter in model.named_parameters():
                if "norm" in key or key.endswith("bias"):
                    parameter.add_(0.3 * torch.randn_like(parameter))
            model.save_pretrained(folder / "parent")
            self.reference = Unrolled(folder / "parent", list(range(sum(SPLIT))), SPLIT)
            self.reference.adapter.normal_(0, 0.3)
        self.folder = folder / "recurrent"
        make_tokenizer(self.folder)
        self.weights = self._weights()
        save_file(self.weights, self.folder / "model.safetensors", metadata={"format": "pt"})
        prelude, block, coda = SPLIT
        own = {
            "architectures": ["RecurrentGPTForCausalLM"],
            "model_type": "recurrent_gpt",
            "parent_model_type": parent,
            "num_prelude_layers": prelude,
            "num_block_layers": block,
            "num_coda_layers": coda,
            "num_recurrences": DEFAULT_DEPTH,
            "initial_state_std": STD,
            "initial_state_seed": SEED,
            "dtype": "float32",
            "auto_map": {
                "AutoConfig": "configuration_recurrent_gpt.RecurrentGPTConfig",
                "AutoModelForCausalLM": "modeling_recurrent_gpt.RecurrentGPTForCausalLM",
            },
        }
        parents = {name: value for name, value in config.to_diff_dict().items() if name not in NOT_EXPORTED}
        (self.folder / "config.json").write_text(json.dumps(parents | own))
        for name in ("configuration", "modeling"):
            (self.folder / f"{name}_recurrent_gpt.py").write_text("raise SystemExit('code of a model was run')\n")

    def _weights(self) -> dict[str, torch.Tensor]:
        reference, weights = self.reference, {}
        weights["model.embed_tokens.weight"] = reference.embedding.weight
        weights["model.adapter.weight"] = reference.adapter
        weights["model.norm.weight"] = reference.norm.weight
        weights["lm_head.weight"] = reference.head
        places = [
            (part, i) for part, count in zip(("prelude", "block", "coda"), SPLIT, strict=True) for i in range(count)
        ]
        for (part, number), layer in zip(places, reference.layers, strict=True):
            for name, tensor in layer.state_dict().items():
                weights[f"model.{part}.{number}.{name}"] = tensor
        return {name: tensor.detach().contiguous() for name, tensor in weights.items()}

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], depth: int) -> tuple[int, ...]:
        """The likeliest continuation; everything is computed anew for every token."""
        ids = list(prompt)
        while len(ids) < len(prompt) + NUM_NEW_TOKENS and (len(ids) == len(prompt) or ids[-1] != EOS):
            state = initial_state(torch.arange(len(ids)), _SHAPE["hidden_size"], STD, SEED, torch.float32)
            ids.append(int(self.reference(torch.tensor([ids]), depth, 0, state[None])[0, -1].argmax()))
        return tuple(ids[len(prompt) :])


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    with unchanged_environment():
        yield


def options(exported: Exported, **changes: Any) -> EngineOptions:
    return EngineOptions(str(exported.folder), CONTEXT, max_num_seqs=MAX_NUM_SEQS, **changes)


def generated(engine: Any, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[tuple[int, ...]]:
    sampling = Sampling(temperature=0, max_new_tokens=NUM_NEW_TOKENS)
    return [completion.token_ids for completion in complete(engine, prompts, sampling)]


def num_layers(depth: int) -> int:
    prelude, block, coda = SPLIT
    return prelude + depth * block + coda


@pytest.mark.parametrize("depth", [None, 1])
def test_tokens_are_those_without_a_cache_and_every_iteration_has_one(exported: Exported, depth: int | None) -> None:
    expected = [exported.greedy(prompt, depth or DEFAULT_DEPTH) for prompt in PROMPTS]
    assert expected != [exported.greedy(prompt, 2) for prompt in PROMPTS]
    with VLLMEngine(options(exported, num_recurrences=depth)) as engine:
        assert generated(engine) == expected
        config = engine._llm.llm_engine.vllm_config
        assert len(config.compilation_config.static_forward_context) == num_layers(depth or DEFAULT_DEPTH)
        # Memory was asked for that many layers, so that there is room for all sequences, and vLLM counted the same.
        assert config.cache_config.num_gpu_blocks == MAX_NUM_SEQS * CONTEXT // BLOCK_TOKENS + 1


@pytest.mark.parametrize("parent", ["qwen2", "olmo2"])
def test_other_parents(parent: str, tmp_path: Path) -> None:
    exported = Exported(tmp_path, parent)
    with VLLMEngine(options(exported, num_recurrences=2)) as engine:
        assert generated(engine) == [exported.greedy(prompt, 2) for prompt in PROMPTS]


def test_chunked_prefill_and_prefix_caching(exported: Exported) -> None:
    import vllm

    prefix = random_ids(BLOCK_TOKENS, 1)
    prompts = [prefix + random_ids(length, length) for length in (5, 9, 20)]
    expected = [exported.greedy(prompt, 2) for prompt in prompts]
    os.environ.update(CPU_ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    llm = vllm.LLM(
        str(exported.folder),
        hf_overrides={"num_recurrences": 2},
        dtype="float32",
        enforce_eager=True,
        max_model_len=CONTEXT,
        max_num_seqs=MAX_NUM_SEQS,
        enable_chunked_prefill=True,
        max_num_batched_tokens=48,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=1 << 26,
    )
    try:
        params = vllm.SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS)
        for num_cached in (0, BLOCK_TOKENS):
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
            assert outputs[0].num_cached_tokens == num_cached
            assert [tuple(output.outputs[0].token_ids) for output in outputs] == expected
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_an_updated_engine_computes_as_one_with_the_new_weights(tmp_path: Path) -> None:
    old, new = (Exported(tmp_path / str(seed), "llama", seed) for seed in (0, 1))
    with open_engine(options(old, num_recurrences=2), needs=["update_weights"]) as engine:
        assert generated(engine) == [old.greedy(prompt, 2) for prompt in PROMPTS]
        engine.update_weights(load_file(new.folder / "model.safetensors").items(), 1)
        assert generated(engine) == [new.greedy(prompt, 2) for prompt in PROMPTS]


@pytest.mark.slow
def test_two_processes_share_a_model(exported: Exported) -> None:
    expected = [exported.greedy(prompt, 2) for prompt in PROMPTS]
    with VLLMEngine(options(exported, num_recurrences=2, tensor_parallel_size=2)) as engine:
        assert generated(engine) == expected


@pytest.mark.slow
def test_a_server_has_the_depth_it_is_given(tmp_path: Path) -> None:
    exported = Exported(tmp_path, "llama")
    chosen = options(exported, num_recurrences=2, kind="vllm-server", log_dir=tmp_path / "logs")
    with open_engine(chosen) as engine:
        assert generated(engine) == [exported.greedy(prompt, 2) for prompt in PROMPTS]


def test_a_folder_is_read_without_running_its_code(exported: Exported) -> None:
    config = load_model_config(str(exported.folder))
    assert (config.model_type, config.num_recurrences) == ("recurrent_gpt", DEFAULT_DEPTH)
    parent = PARENTS[config.parent_model_type]
    assert {name: getattr(config, name) for name in _SHAPE} == {name: getattr(parent, name) for name in _SHAPE}
    assert config.rope_parameters == parent.rope_parameters
    assert load_tokenizer(str(exported.folder)).eos_token_id == EOS
    assert check_context(str(exported.folder), 412, 100) == 512


def test_a_depth_is_refused_where_there_is_none_to_choose(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a recurrent model"):
        VLLMEngine(EngineOptions(make_model(tmp_path / "model"), num_recurrences=2))
    with pytest.raises(UserError, match='cannot be chosen for the engine "endpoint"'):
        options(exported, num_recurrences=2, kind="endpoint", endpoints=("http://host:8000/v1",))
    with pytest.raises(UserError, match="num_recurrences"):
        options(exported, num_recurrences=0)


def test_a_plugin_that_vllm_does_not_load_is_named(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "others")
    with pytest.raises(UserError, match=r"VLLM_PLUGINS=others excludes .*: add recurrent_gpt"):
        VLLMEngine(options(exported))


def test_biases_that_vllm_lacks_are_refused_at_once(tmp_path: Path) -> None:
    exported = Exported(tmp_path, "olmo2")
    path = exported.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
    with pytest.raises(UserError, match=r'attention_bias is not supported in vLLM .* choose the engine "transformers"'):
        VLLMEngine(options(exported))
