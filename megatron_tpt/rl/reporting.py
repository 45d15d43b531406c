"""The metrics of an iteration."""

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_tpt.rl.curves import curve_metrics
from megatron_tpt.rl.experience import Experience
from megatron_tpt.rl.losses import kl_estimates
from megatron_tpt.rl.mismatch import mismatch_metrics

if TYPE_CHECKING:
    from megatron_tpt.rl.collecting import Collected
    from megatron_tpt.rl.scoring import Process


def iteration_metrics(experience: Experience, collected: "Collected", process: "Process | None") -> dict[str, float]:
    """What is written to metrics.jsonl with the first step of an iteration.

    `rollouts` counts all that were sampled. Of these: `reward`, `reward/NAME`, `accuracy`, `response_tokens`,
    `truncated`, and the share of prompts whose rollouts all are right, all wrong, or neither (`groups/right`,
    `groups/wrong`, `groups/mixed`). Of those that are trained on: `rollout_entropy` and `reference_kl` (k3) in nats per
    token, `mismatch/*` of engine and trainer. `seconds/*` say where the time went, on the first rank.
    """
    every = collected.samples
    metrics = {"rollouts": float(len(every)), "reward": _mean([sum(one.rewards.values()) for one in every])}
    metrics |= {f"reward/{name}": _mean([one.rewards[name] for one in every]) for name in every[0].rewards}
    metrics["accuracy"] = _mean([float(one.is_correct) for one in every])
    metrics["response_tokens"] = _mean([float(len(one.token_ids)) for one in every])
    metrics["truncated"] = _mean([float(one.is_truncated) for one in every])
    groups = defaultdict(set)
    for one in every:
        groups[one.position].add(one.is_correct)
    kinds = list(groups.values())
    for name, kind in (("right", {True}), ("wrong", {False}), ("mixed", {True, False})):
        metrics[f"groups/{name}"] = _mean([float(group == kind) for group in kinds])
    columns, mask = experience.columns, experience.mask
    metrics["rollout_entropy"] = columns["entropy"][mask].mean().item()
    if "reference" in columns:
        kl = kl_estimates(columns["old"], columns["reference"], "k3")
        metrics["reference_kl"] = kl[mask].mean().item()
    found = mismatch_metrics(columns["old"], columns["engine"], mask)
    metrics |= {f"mismatch/{name}": value for name, value in found.items()}
    metrics |= {f"mismatch/probe_{name}": value for name, value in collected.probe_metrics.items()}
    if process is not None:
        metrics |= process_metrics(experience, process)
    return metrics | {f"seconds/{name}": value for name, value in collected.seconds.items()}


def process_metrics(experience: Experience, process: "Process") -> dict[str, float]:
    """REPRO's: those of its curves (`curve_metrics`); the share of rollouts whose thinking does not end (`unclosed`);
    the mean process advantage, alpha included, of the tokens of right and of wrong rollouts; and its correlation with
    the length of the response."""
    metrics = curve_metrics(process.curves)
    metrics["repro/unclosed"] = process.unclosed_share
    metrics["repro/scored_tokens"] = float(process.num_tokens)
    lengths = experience.mask.sum(dim=1)
    of_rollouts = experience.columns["process"].sum(dim=1) / lengths
    right = experience.is_correct
    for name, chosen in (("right", right), ("wrong", ~right)):
        if chosen.any():
            metrics[f"repro/advantage_{name}"] = of_rollouts[chosen].mean().item()
    if (correlation := _correlation(of_rollouts, lengths.float())) is not None:
        metrics["repro/advantage_length_correlation"] = correlation
    return metrics


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's; None where one of both does not vary."""
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()
