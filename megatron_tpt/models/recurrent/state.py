"""The initial state of the recurrence: noise that depends on a seed and on a token's place alone.

A hash of (seed, place, channel) takes the part of a random stream: any rank computes its own part of the noise of a
micro-batch, whatever the layout, and a sequence that is continued keeps the states that it had.
"""

import math

import torch

TRUNCATION = 3.0
"""In standard deviations."""
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 as if unsigned."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: torch.Tensor) -> torch.Tensor:
    """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): int64 [...] -> int64 [...]."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        value = (value ^ _shift_right(value, shift)) * _signed(factor)
    return value ^ _shift_right(value, _SHIFTS[-1])


def initial_state(places: torch.Tensor, width: int, std: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal noise of standard deviation `std` before it is truncated at three times that, for tokens at `places`,
    int64 [...]: [..., width] on their device."""
    channels = torch.arange(1, width + 1, device=places.device) * _signed(_GOLDEN)
    of_place = _mix(places + _signed(seed * _GOLDEN))
    bits = _shift_right(_mix(of_place[..., None] + channels), 40)  # 24, as fp32 has
    largest = math.erf(TRUNCATION / math.sqrt(2))
    uniform = ((bits.to(torch.float32) + 0.5) * 2.0**-23 - 1.0) * largest  # in (-largest, largest)
    return (torch.erfinv(uniform) * (math.sqrt(2) * std)).to(dtype)
