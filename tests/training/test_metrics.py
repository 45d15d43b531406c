"""The numbers that are reported, against independent counts."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_tpt import platform
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.models.gpt.build import build_model
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.models.sizes import model_flops_per_token
from megatron_tpt.objectives.language_modeling import LanguageModeling, perplexity
from megatron_tpt.training.metrics import device_peak_tflops, remaining_s, step_times, throughput

MODEL = GPTConfig(vocab_size=256, num_layers=3, hidden_size=64, ffn_hidden_size=160, num_query_groups=2)


def test_flops_per_token_are_those_that_torch_counts() -> None:
    length, batch = 48, 2
    with platform.process_groups(ParallelConfig()):
        platform.seed_everything(0)
        gpt = build_model(MODEL, ParallelConfig(), TrainingConfig(dtype="float32", sequence_length=length), seed=0)
        tokens = torch.zeros(batch, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            gpt(tokens, torch.arange(length).expand(batch, -1), None, labels=tokens).sum().backward()
    # torch counts the attention products in full; ours are half of that, for the causal mask.
    attention = 6 * MODEL.num_layers * length * MODEL.num_attention_heads * MODEL.kv_channels
    assert counter.get_total_flops() / (batch * length) == model_flops_per_token(MODEL, length) + attention


def test_number_of_parameters_is_that_of_the_model() -> None:
    biases = {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}
    tied = GPTConfig(vocab_size=300, tie_embeddings=True, qkv_bias=True, qk_norm=True, head_dim=32)
    for model in (MODEL, tied, GPTConfig(vocab_size=300, **biases), GPTConfig(vocab_size=300, mlp_bias=True)):
        with platform.process_groups(ParallelConfig()):
            platform.seed_everything(0)
            gpt = build_model(model, ParallelConfig(), TrainingConfig(dtype="float32"), seed=0)
            assert sum(parameter.numel() for parameter in gpt.parameters()) == model.num_parameters()


def sums_of(*values: float, **others: float) -> dict[str, float]:
    return dict(zip(("loss", "tokens", "thinking_loss", "thinking_tokens"), values, strict=True)) | others


def losses(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != "perplexity"}


def test_losses_are_means_over_their_own_tokens() -> None:
    metrics = LanguageModeling().metrics(sums_of(14.0, 5, 8.0, 2))
    assert losses(metrics) == {"loss": 14 / 5, "loss_document": 2.0, "loss_thinking": 4.0}
    metrics = LanguageModeling(unmarked_name="answer").metrics(sums_of(6.0, 3, 0.0, 0))
    assert losses(metrics) == {"loss": 2.0, "loss_answer": 2.0}
    assert LanguageModeling().metrics(sums_of(0.0, 0, 0.0, 0)) == {}, "0 / 0 is no loss"


def test_losses_of_sources_are_reported_apart_where_there_are_several() -> None:
    sums = {"source_loss/a": 14.0, "source_tokens/a": 4, "source_loss/b": 0.0, "source_tokens/b": 0}
    sums = sums_of(15.0, 6, 8.0, 1, **sums, **{"source_loss/c": 1.0, "source_tokens/c": 2})
    of_sources = {n: v for n, v in LanguageModeling("abc").metrics(sums).items() if n.startswith("source_")}
    assert of_sources == {"source_loss/a": 3.5, "source_loss/c": 0.5}
    assert LanguageModeling(["a"]).sum_names == tuple(sums_of(0, 0, 0, 0))


def test_step_times_are_quantiles_of_the_window() -> None:
    times = step_times([1.0] * 19 + [11.0])
    assert times == pytest.approx({"step_s": 1.5, "step_p50_s": 1.0, "step_p95_s": 1.5, "step_max_s": 11.0})
    assert step_times([2.0]) == {"step_s": 2.0, "step_p50_s": 2.0, "step_p95_s": 2.0, "step_max_s": 2.0}


def test_time_that_remains_is_at_the_pace_of_the_window() -> None:
    assert remaining_s(100, 30.0, 10) == 300.0


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert perplexity(2.0) == pytest.approx(7.389056)
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp8", 1978.9),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "fp8", 4500.0),
        ("NVIDIA GB200", "bf16", 2500.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(device: str, precision: str, peak: float | None) -> None:
    assert device_peak_tflops(device, precision) == peak


def test_throughput_names_its_denominators() -> None:
    speed = throughput(8000, 2.0, 0.1, flops_per_token=3e9, num_devices=4, peak_tflops=10.0)
    assert speed["tokens_per_s"] == 4000
    assert speed["tokens_per_s_per_device"] == 1000
    assert speed["tflops_per_device"] == pytest.approx(3.0)
    assert speed["mfu"] == pytest.approx(0.3)
    assert speed["data_wait_fraction"] == pytest.approx(0.05)
