"""Commands that depend on each other, on this machine; tests/studies/test_study_grid.py runs them on SLURM too."""

from pathlib import Path

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.jobs.graph import Node, run_graph
from megatron_tpt.jobs.options import ScaleOptions

TWO = ScaleOptions(num_workers=2)


def node(folder: Path, name: str, shell: str, *after: str) -> Node:
    """Notes its name when it begins."""
    command = ["bash", "-c", f"echo {name} >> {folder}/begun; {shell}"]
    return Node(name, command, folder / name / "logs", after, ScaleOptions())


def test_a_command_starts_after_those_that_it_needs_and_not_after_a_failed_one(tmp_path: Path) -> None:
    nodes = [
        node(tmp_path, "good", "sleep 0.3"), node(tmp_path, "bad", "exit 2"),
        node(tmp_path, "after_good", "true", "good"), node(tmp_path, "after_bad", "true", "bad"),
        node(tmp_path, "after_both", "true", "good", "bad"), node(tmp_path, "last", "true", "after_bad"),
        node(tmp_path, "before_now", "true", "finished_earlier"),
    ]  # fmt: skip
    results = run_graph(nodes, TWO)
    assert {name: result.state for name, result in results.items()} == {
        "good": "finished", "bad": "failed", "after_good": "finished", "after_bad": "not run",
        "after_both": "not run", "last": "not run", "before_now": "finished",
    }  # fmt: skip
    begun = (tmp_path / "begun").read_text().split()
    assert sorted(begun) == ["after_good", "bad", "before_now", "good"]
    assert begun.index("after_good") > begun.index("good")


def test_as_many_commands_run_at_once_as_are_allowed(tmp_path: Path) -> None:
    """Each waits for another one to have begun, so that one alone would wait in vain."""
    meet = f"for i in $(seq 600); do [ $(wc -l < {tmp_path}/begun) -ge 2 ] && exit 0; sleep 0.1; done; exit 1"
    results = run_graph([node(tmp_path, name, meet) for name in "abc"], TWO)
    assert [result.state for result in results.values()] == ["finished"] * 3


def test_ray_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this machine"):
        run_graph([node(tmp_path, "a", "true")], ScaleOptions("ray"))
