"""Sequences that share their beginning, in one row: a trunk, and branches that see its first tokens and themselves.

Batches of such rows have, in addition to `segment_ids`, one for each tree of a row, and `position_ids`, these tensors
[b, s]: `branch_ids`, 0 for a trunk, and `num_shared`, the tokens of the trunk that a branch begins with, so that its
own positions begin there. Attention must take a mask, which Transformer Engine's packed attention does not.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_tpt.objectives.objective import MicroBatch

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding


def outside_branch(batch: MicroBatch) -> Tensor:
    """Where attention is masked, bool [b, s, s]: from a trunk at its branches; from a branch at other branches, and at
    the tokens of the trunk that it does not share."""
    branches = batch["branch_ids"]
    is_own = branches[:, :, None] == branches[:, None, :]
    is_shared = (branches == 0)[:, None, :] & (batch["position_ids"][:, None, :] < batch["num_shared"][:, :, None])
    return ~(is_own | is_shared)


@contextlib.contextmanager
def positions(model: torch.nn.Module, position_ids: Tensor) -> Iterator[None]:
    """Rotate queries and keys by `position_ids` [b, s]. Megatron Core rotates them by their place in the row, which
    has the same effect where all that a token sees is as far from it in the row as in its sequence."""

    def of_tokens(_module: torch.nn.Module, _arguments: object, angles: Tensor) -> Tensor:
        return angles[position_ids.T, 0]  # [s, 1, 1, dim] to [s, b, 1, dim]

    hooks = [
        module.register_forward_hook(of_tokens) for module in model.modules() if isinstance(module, RotaryEmbedding)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
