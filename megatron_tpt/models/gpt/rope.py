"""Rotary frequencies, with scaling to extend the context after training, as Hugging Face's models compute them."""

import math

import torch

from megatron_tpt.models.gpt.config import GPTConfig


def rotary_frequencies(model: GPTConfig) -> torch.Tensor:
    """The angle per position of each pair of dimensions of a head, in radians: [head_dim / 2], fp32, on the CPU."""
    exponents = torch.arange(0, model.kv_channels, 2, dtype=torch.float32, device="cpu") / model.kv_channels
    frequencies = 1.0 / model.rotary_base**exponents
    factor = model.rope_scaling_factor
    if factor is None:
        return frequencies
    if model.rope_scaling_type == "linear":
        return frequencies / factor
    share = _llama3_share(frequencies, model) if model.rope_scaling_type == "llama3" else _yarn_share(model)
    return (1 - share) * frequencies / factor + share * frequencies


def rotary_attention_factor(model: GPTConfig) -> float:
    """The factor on cosines and sines: YaRN's attention temperature, otherwise 1."""
    if model.rope_scaling_factor is None or model.rope_scaling_type != "yarn":
        return 1.0
    if model.rope_attention_factor is not None:
        return model.rope_attention_factor
    return yarn_mscale(model.rope_scaling_factor)


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """0.1 weight ln(factor) + 1 (https://arxiv.org/abs/2309.00071, equation 22); 1 without an extension."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3_share(frequencies: torch.Tensor, model: GPTConfig) -> torch.Tensor:
    """The weight of each original frequency: 0 for low ones, 1 for high ones, in between interpolated by the number of
    turns in the original context."""
    turns = model.rope_original_context * frequencies / (2 * math.pi)
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_share(model: GPTConfig) -> torch.Tensor:
    """The same for YaRN, interpolated by the index of the dimension."""

    def dimension(turns: float) -> float:
        """The dimension whose frequency makes `turns` turns in the original context."""
        per_turn = model.rope_original_context / (turns * 2 * math.pi)
        return model.kv_channels * math.log(per_turn) / (2 * math.log(model.rotary_base))

    low, high = dimension(model.rope_beta_fast), dimension(model.rope_beta_slow)
    if model.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, model.kv_channels - 1)
    width = high - low or 0.001  # both at one dimension
    numbers = torch.arange(model.kv_channels // 2, dtype=torch.float32, device="cpu")
    return 1 - ((numbers - low) / width).clamp(0, 1)
