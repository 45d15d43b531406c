"""Metrics of models whose depth varies from micro-batch to micro-batch, around any objective."""

import bisect
from collections.abc import Mapping, Sequence

import torch

from megatron_tpt.objectives.objective import MicroBatch, Objective

_DEPTHS = ("recurrences", "backprop", "mean_recurrences")


class DepthMetrics:
    """Another objective, whose loss also is reported by depth, with the depths and the norms of the states.

    Micro-batches have the depths of RecurrentConfig.draws (`drawn_recurrences` and so on, int64 []) and the
    measurements of RecurrentBlock.forward (`state_norm`, `state_change`). Means are over all tokens, with or without
    loss.
    """

    def __init__(self, objective: Objective, limits: Sequence[int]) -> None:
        """`limits` are the smallest depths of the groups by which the loss is reported, ascending, from 1."""
        self.objective = objective
        self.needs = objective.needs
        self.limits = tuple(limits)
        last = [f"{limit - 1}" for limit in self.limits[1:]]
        self.groups = [
            f"{first}" if f"{first}" == end else f"{first}-{end}"
            for first, end in zip(self.limits, [*last, ""], strict=True)
        ]
        by_group = [f"depth_{kind}/{group}" for kind in ("loss", "tokens") for group in self.groups]
        self.own_names = ("depth_positions", *(f"depth_{name}" for name in _DEPTHS), "state_norm", "state_change")
        self.sum_names = (*objective.sum_names, *self.own_names, *by_group)

    def __call__(self, outputs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, sums = self.objective(outputs, batch)
        num_tokens = batch["tokens"].numel()
        zero = loss.new_zeros((), dtype=torch.float64)
        own = dict.fromkeys(self.sum_names[len(self.objective.sum_names) :], zero)
        if "drawn_recurrences" not in batch:  # a batch of another loop, without draws
            return loss, {**sums, **own}
        own["depth_positions"] = zero + num_tokens
        own |= {f"depth_{name}": zero + num_tokens * batch[f"drawn_{name}"] for name in _DEPTHS}
        own |= {name: batch[name].double() for name in ("state_norm", "state_change")}
        group = self.groups[bisect.bisect_right(self.limits, int(batch["drawn_recurrences"])) - 1]
        own |= {f"depth_{kind}/{group}": sums[kind].double() for kind in ("loss", "tokens")}
        return loss, {**sums, **own}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Those of the objective, and means over tokens: `depth` (iterations), `depth_backprop` (those with gradient),
        `depth_mean` (the curriculum's), `state_norm` and `state_change` (of the last iteration), and the loss by depth
        (`depth_loss/4-7`)."""
        result = self.objective.metrics(sums)
        if not (positions := sums["depth_positions"]):
            return result
        names = {"depth": "depth_recurrences", "depth_backprop": "depth_backprop"}
        names |= {"depth_mean": "depth_mean_recurrences", "state_norm": "state_norm", "state_change": "state_change"}
        result |= {shown: sums[name] / positions for shown, name in names.items()}
        for group in self.groups:
            if tokens := sums[f"depth_tokens/{group}"]:
                result[f"depth_loss/{group}"] = sums[f"depth_loss/{group}"] / tokens
        return result
