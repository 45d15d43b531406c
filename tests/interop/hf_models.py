"""Small random Hugging Face models, and the logits of models on both sides."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from megatron_tpt import platform
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.interop.hf_export import read_model_config
from megatron_tpt.models.gpt.build import build_model
from megatron_tpt.training.checkpoint_loading import load_weights

VOCAB_SIZE = 300  # not a multiple of 128: Megatron Core's side is padded

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,  # heads of 32: smaller ones vLLM does not have on CPUs
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Weights far larger than those of a model to train make logits that are far apart.
    "initializer_range": 0.1,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 128}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_SHAPE, rms_norm_eps=1e-5),
    "llama3-scaled-tied": transformers.LlamaConfig(
        **{**_SHAPE, "max_position_embeddings": 131072},
        head_dim=64,
        tie_word_embeddings=True,
        rope_parameters=_LLAMA3_ROPE,
    ),
    "qwen2": transformers.Qwen2Config(
        **_SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, use_sliding_window=False
    ),
    "qwen3-tied": transformers.Qwen3Config(**_SHAPE, head_dim=64, tie_word_embeddings=True),
    "llama-biases-linear": transformers.LlamaConfig(
        **_SHAPE,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "qwen2-yarn": transformers.Qwen2Config(**_SHAPE, rope_parameters=_YARN),
}
# Not compared with vLLM: it has no biases behind Qwen3's attention; for the others, what is compared suffices.
WITHOUT_VLLM: dict[str, transformers.PreTrainedConfig] = {
    "qwen3-biases-yarn": transformers.Qwen3Config(
        **_SHAPE,
        attention_bias=True,
        rope_parameters={**_YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 0.8},
    ),
    "olmo2": transformers.Olmo2Config(
        **_SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, attention_bias=True
    ),
    "llama-attention-bias-yarn": transformers.LlamaConfig(
        **_SHAPE, attention_bias=True, rope_parameters={**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3}
    ),
    "llama-mlp-bias-llama3": transformers.LlamaConfig(
        **_SHAPE,
        mlp_bias=True,
        rope_parameters={
            **_LLAMA3_ROPE,
            "low_freq_factor": 2.0,
            "high_freq_factor": 8.0,
            "original_max_position_embeddings": 256,
        },
    ),
}
ALL_CONFIGS = CONFIGS | WITHOUT_VLLM


@torch.no_grad()
def save_hf_model(name: str, folder: Path, tokenizer: Path, **options: Any) -> Path:
    """A model with random weights everywhere (norms and biases too) and a tokenizer, as transformers saves it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ALL_CONFIGS[name], dtype=options.pop("dtype", torch.float32))
    for key, parameter in model.named_parameters():
        if "norm" in key:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif key.endswith("bias"):
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder, **options)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def hf_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_weights(folder: Path, reference: Path) -> None:
    """The same names, precisions and bits."""
    weights, expected = hf_weights(folder), hf_weights(reference)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def some_tokens(num_rows: int = 2, length: int = 256) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (num_rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """[b, s, vocabulary] of transformers in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return model.eval()(tokens).logits


@torch.no_grad()
def megatron_logits(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """[b, s, vocabulary] of Megatron Core in fp32, without the padding of the vocabulary."""
    parallel, training = ParallelConfig(), TrainingConfig(dtype="float32")
    model = read_model_config(checkpoint)
    with platform.process_groups(parallel):
        platform.seed_everything(0)
        gpt = build_model(model, parallel, training, seed=0).eval()
        load_weights(checkpoint, gpt)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return gpt(tokens, positions, attention_mask=None)[..., : model.vocab_size]


@torch.no_grad()
def megatron_greedy(checkpoint: Path, prompts: torch.Tensor, num_new_tokens: int) -> tuple[torch.Tensor, float]:
    """The likeliest continuations [b, num_new_tokens] of prompts [b, s], and the smallest lead of a chosen token's
    logit over the next one's."""
    parallel, training = ParallelConfig(), TrainingConfig(dtype="float32")
    model = read_model_config(checkpoint)
    tokens, smallest_lead = prompts, float("inf")
    with platform.process_groups(parallel):
        platform.seed_everything(0)
        gpt = build_model(model, parallel, training, seed=0).eval()
        load_weights(checkpoint, gpt)
        for _ in range(num_new_tokens):
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            logits = gpt(tokens, positions, attention_mask=None)[:, -1, : model.vocab_size]
            first, second = logits.topk(2).values.unbind(-1)
            smallest_lead = min(smallest_lead, float((first - second).min()))
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens[:, prompts.shape[1] :], smallest_lead
