"""Small random batches of rollouts, in fp64."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LENGTHS = (12, 9, 5, 12, 7, 3, 12, 10, 6)
GROUPS = (7, 7, 2, 2, 7, 2, 2, 7, 5)  # interleaved, not counted from 0, and the last is alone
SCORES = (1.0, 0.0, 0.0, 1.0, 1.0, 1.0, -0.5, 1.0, 1.0)


class Rollouts(NamedTuple):
    """[B, T], but `groups` [B]."""

    mask: Tensor
    groups: Tensor
    rewards: Tensor
    old_log_probs: Tensor
    log_probs: Tensor
    advantages: Tensor
    values: Tensor

    @property
    def prompts(self) -> np.ndarray:
        """The groups as verl has them."""
        return np.array([f"prompt {group}" for group in self.groups.tolist()], dtype=object)


def rollouts(*, with_gaps: bool = False) -> Rollouts:
    """With rewards at all tokens, the largest at the last one. Log-probabilities differ by 0.7, so that many ratios are
    out of every clip range. With gaps, tokens inside of the responses are not in the mask."""
    random = torch.Generator().manual_seed(0)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    if with_gaps:
        mask[:, 1:3] = False
        mask[0, 5:8] = False

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(mask.shape, generator=random, dtype=torch.float64)

    rewards = noise(0.05)
    rewards[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = torch.tensor(SCORES, dtype=torch.float64)
    old = -noise(1.0).abs()
    return Rollouts(
        mask=mask,
        groups=torch.tensor(GROUPS),
        rewards=rewards.where(mask, 0),
        old_log_probs=old,
        log_probs=(old + noise(0.7)).requires_grad_(),
        advantages=noise(1.0),
        values=noise(1.0).where(mask, 0),
    )
