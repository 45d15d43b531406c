"""A rank that is slow at its own work is named, not those that wait for it."""

from pathlib import Path

import pytest
import yaml
from training_runs import Workers, read_metrics

from megatron_tpt.training.stragglers import slowdowns


@pytest.mark.parametrize("where", ["data", "work"])
def test_the_slow_one_of_two_ranks_is_named(where: str, recipe: dict, tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "run.yaml"
    changes = {"training": {**recipe["training"], "num_steps": 4}, "logging": {"log_interval": 2, "tensorboard": False}}
    path.write_text(yaml.safe_dump({**recipe, **changes, "run": {"output_dir": str(tmp_path / "run")}}))
    output = workers.run("slow_pretrain", [str(path), f"--slow=1:0.3:{where}"], 2)
    lines = [line for line in output.splitlines() if "is slow" in line]
    assert len(lines) == 2 and all(line.startswith("warning: rank 1 (") for line in lines)
    for row in read_metrics(tmp_path / "run"):
        assert row["slowest_rank"] == 1 and row["slowest_rank_ratio"] > 1.5
        assert row["step_s"] > 0.6  # both wait for it, in each of two micro-batches


def test_ranks_are_compared_with_those_of_their_own_pipeline_stage() -> None:
    found = slowdowns([1.0, 1.2, 1.0, 3.0, 3.0, 6.0], [0, 0, 0, 1, 1, 1])
    assert [one.ratio for one in found] == pytest.approx([1.0, 1.2, 1.0, 1.0, 1.0, 2.0])
    assert slowdowns([5.0], [0])[0].ratio == 1.0
