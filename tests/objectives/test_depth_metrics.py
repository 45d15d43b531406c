"""The loss by depth, and the means over tokens of what a recurrent model draws and measures."""

import torch

from megatron_tpt.objectives.depth import DepthMetrics
from megatron_tpt.objectives.language_modeling import LanguageModeling


def microbatch(depth: int, norm: float, change: float) -> dict[str, torch.Tensor]:
    """Two rows of four tokens, of which six have a loss."""
    drawn = {"recurrences": depth, "backprop": min(depth, 2), "mean_recurrences": 3}
    return {
        "tokens": torch.zeros(2, 4, dtype=torch.long),
        "labels": torch.zeros(2, 4, dtype=torch.long),
        "loss_mask": torch.tensor([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]),
        "is_thinking": torch.zeros(2, 4, dtype=torch.bool),
        "state_norm": torch.tensor(norm),
        "state_change": torch.tensor(change),
        **{f"drawn_{name}": torch.tensor(value) for name, value in drawn.items()},
    }


def test_sums_of_micro_batches_become_means_by_depth() -> None:
    objective = DepthMetrics(LanguageModeling(), (1, 2, 4, 8))
    assert objective.groups == ["1", "2-3", "4-7", "8-"]
    total = dict.fromkeys(objective.sum_names, 0.0)
    for depth, loss in ((3, 1.0), (2, 2.0), (7, 4.0), (31, 8.0)):
        value, sums = objective(torch.full((2, 4), loss), microbatch(depth, 80.0, 8.0 * depth))
        assert float(value) == 6 * loss and tuple(sums) == objective.sum_names
        total = {name: total[name] + float(sums[name]) for name in total}
    metrics = objective.metrics(total)
    assert metrics["loss"] == (1 + 2 + 4 + 8) / 4
    assert (metrics["depth"], metrics["depth_backprop"], metrics["depth_mean"]) == (43 / 4, 2.0, 3.0)
    assert (metrics["state_norm"], metrics["state_change"]) == (10.0, 43 / 4)
    by_depth = {name: value for name, value in metrics.items() if name.startswith("depth_loss/")}
    assert by_depth == {"depth_loss/2-3": 1.5, "depth_loss/4-7": 4.0, "depth_loss/8-": 8.0}


def test_batches_without_draws_have_the_metrics_of_the_objective_alone() -> None:
    plain = LanguageModeling()
    objective = DepthMetrics(plain, (1, 2))
    batch = {name: value for name, value in microbatch(1, 0.0, 0.0).items() if not name.startswith("drawn_")}
    _, sums = objective(torch.ones(2, 4), batch)
    _, own = plain(torch.ones(2, 4), batch)
    assert tuple(sums) == objective.sum_names
    assert objective.metrics({name: float(value) for name, value in sums.items()}) == plain.metrics(
        {name: float(value) for name, value in own.items()}
    )
