"""The weights that engines get are those that describe them, under every layout."""

from pathlib import Path
from typing import Any

import pytest
from rl_runs import make_problems, make_start, rl_recipe, write_recipe
from training_runs import Workers

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}}),
    "pp2": (2, {"parallel": {"pipeline_parallel_size": 2}}),
}


@pytest.mark.parametrize("layout", ["one", *(pytest.param(one, marks=pytest.mark.slow) for one in ("tp2", "pp2"))])
def test_weights_are_as_described_before_they_are_gathered(layout: str, tmp_path: Path) -> None:
    num_processes, changes = LAYOUTS[layout]
    problems = make_problems(tmp_path / "problems.jsonl")
    recipe = rl_recipe(make_start(tmp_path / "start"), problems, tmp_path / "run", training={"num_steps": 2}, **changes)
    Workers().run("described_weights", [str(write_recipe(recipe))], num_processes)
