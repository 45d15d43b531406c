"""The numbers that are reported, against independent counts."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_tpt import platform
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.config.recipe import ParallelConfig, TrainingConfig
from megatron_tpt.models.gpt import build_model
from megatron_tpt.training.metrics import LossSums, model_flops_per_token, throughput

MODEL = ModelConfig(vocab_size=256, num_layers=3, hidden_size=64, ffn_hidden_size=160, num_query_groups=2)


def test_flops_per_token_are_those_that_torch_counts() -> None:
    length, batch = 48, 2
    with platform.process_groups(ParallelConfig()):
        platform.seed_everything(0)
        gpt = build_model(MODEL, ParallelConfig(), TrainingConfig(dtype="fp32", sequence_length=length), seed=0)
        tokens = torch.zeros(batch, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            gpt(tokens, torch.arange(length).expand(batch, -1), None, labels=tokens).sum().backward()
    # torch counts the attention products in full; ours are half of that, for the causal mask.
    attention = 6 * MODEL.num_layers * length * MODEL.num_attention_heads * MODEL.kv_channels
    assert counter.get_total_flops() / (batch * length) == model_flops_per_token(MODEL, length) + attention


def test_number_of_parameters_is_that_of_the_model() -> None:
    for model in (MODEL, ModelConfig(vocab_size=300, tie_embeddings=True, qkv_bias=True, qk_norm=True, head_dim=32)):
        with platform.process_groups(ParallelConfig()):
            platform.seed_everything(0)
            gpt = build_model(model, ParallelConfig(), TrainingConfig(dtype="fp32"), seed=0)
            assert sum(parameter.numel() for parameter in gpt.parameters()) == model.num_parameters()


def test_losses_are_means_over_their_own_tokens() -> None:
    assert LossSums(6.0, 3, 8.0, 2).means() == {"loss": 14 / 5, "loss_document": 2.0, "loss_thinking": 4.0}
    assert LossSums(6.0, 3, 0.0, 0).means("answer") == {"loss": 2.0, "loss_answer": 2.0}
    assert math.isnan(LossSums().means()["loss"])


def test_throughput_names_its_denominators() -> None:
    speed = throughput(8000, 2.0, 0.1, flops_per_token=3e9, num_devices=4, peak_tflops=10.0)
    assert speed["tokens_per_s"] == 4000
    assert speed["tokens_per_s_per_device"] == 1000
    assert speed["tflops_per_device"] == pytest.approx(3.0)
    assert speed["mfu"] == pytest.approx(0.3)
    assert speed["data_wait_fraction"] == pytest.approx(0.05)
