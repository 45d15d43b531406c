"""The interface between training and objectives."""

from collections.abc import Mapping
from typing import Literal, Protocol

import torch

MicroBatch = dict[str, torch.Tensor]
"""Tensors by name: per token, [b, s] (`tokens`, `labels`, `loss_mask`, ...), or per sample, [b]."""

Needs = Literal["token_losses", "logits"]


class Objective(Protocol):
    """Computes a loss, and sums for metrics, from a model's outputs on a micro-batch.

    Called only on the last pipeline stage, once per micro-batch.
    """

    needs: Needs
    """The outputs that the model returns: the cross-entropy of every label, fp32 [b, s], or logits, split over the
    tensor-parallel group along the vocabulary, [b, s, v / t] (see vocab_parallel.py). With packed attention the b * s
    tokens are one row: [1, b * s, ...]."""
    sum_names: tuple[str, ...]
    """Names of the sums, the same on all ranks. The first two must be "loss" and "tokens": their quotient is the mean
    loss, which the detection of spikes uses."""

    def __call__(self, outputs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the loss to differentiate, a sum over tokens, and the named sums, detached.

        The sums are accumulated over micro-batches, ranks and steps. Gradients are divided by `tokens` of the whole
        global batch, so that they do not depend on the split into micro-batches and ranks.
        """

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The metrics of some steps or of a validation set: "loss" and others; empty if `tokens` is 0."""
