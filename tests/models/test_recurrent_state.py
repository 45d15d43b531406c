"""The initial state is truncated normal noise that depends on a seed and on a token's place alone."""

import torch
from scipy.stats import kstest, truncnorm

from megatron_tpt.models.recurrent.state import initial_state

STD = 0.008703882797784892


def state(places: torch.Tensor, seed: int = 5, width: int = 64) -> torch.Tensor:
    return initial_state(places, width, STD, seed, torch.float32)


def test_values_are_normal_and_truncated_at_three_standard_deviations() -> None:
    values = state(torch.arange(2000)).flatten() / STD
    assert values.abs().max() <= 3.0 and values.unique().numel() > 0.98 * values.numel()
    assert kstest(values.double().numpy(), truncnorm(-3, 3).cdf).pvalue > 1e-3


def test_tokens_channels_and_seeds_are_independent() -> None:
    first, other = (state(torch.arange(4000), seed, 32) for seed in (5, 6))
    together = torch.cat([first, other, first.roll(1, dims=0)], dim=1)
    correlations = torch.corrcoef(together.T) - torch.eye(96)
    assert correlations.abs().max() < 5 / 4000**0.5


def test_a_part_of_the_places_has_the_noise_of_the_whole() -> None:
    whole = state(torch.arange(24).view(12, 2))
    assert torch.equal(state(torch.arange(24).view(12, 2)[6:]), whole[6:])
    assert torch.equal(state(torch.tensor([7])), whole.view(24, -1)[7:8])
    assert torch.equal(initial_state(torch.arange(24), 8, STD, 5, torch.float32), whole.view(24, -1)[:, :8])
    assert state(torch.arange(3), seed=2**63 - 1).isfinite().all()
