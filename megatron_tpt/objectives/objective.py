"""What training asks of an objective."""

from collections.abc import Mapping
from typing import Literal, Protocol

import torch

MicroBatch = dict[str, torch.Tensor]
"""Tensors by name: of tokens, [b, s] (`tokens`, `labels`, `loss_mask`, ...), and of samples, [b]."""

Needs = Literal["token_losses", "logits"]


class Objective(Protocol):
    """Turns what a model makes of a micro-batch into a loss, and into sums of which metrics are made.

    Called only on the last pipeline stage, once for every micro-batch.
    """

    needs: Needs
    """What the model returns: the cross-entropy of every label, fp32 [b, s]; or logits, split over the tensor-parallel
    group along the vocabulary, [b, s, v / t] (see vocab_parallel.py). Under packed attention b * s tokens are one
    row: [1, b * s, ...]."""
    sum_names: tuple[str, ...]
    """Names of the sums, the same on all ranks. The first two are "loss" and "tokens": the first over the second is the
    mean loss, which detection of spikes uses."""

    def __call__(self, outputs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the loss to differentiate, a sum over tokens, and the sums by their names, without gradients.

        The sums are added up over micro-batches, ranks and steps. Gradients are divided by `tokens` of the whole global
        batch, so that no split into micro-batches and ranks changes them.
        """

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What to report of some steps or of a validation set: "loss" and others; nothing where `tokens` is 0."""
