"""kill -9 of the trainer, anywhere, or of its graders: nothing is lost or counted twice, no reward is zero for it, and
the same command continues to the bit."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from rl_runs import PPO, PROGRAM, THINKING, has_step, learned, merged, rl_recipe, rollouts_of, write_recipe
from training_runs import Workers, read_metrics

PHASES = (
    "sending weights", "sampling", "grading", "scoring", "scoring answers", "writing rollouts",
    "between the steps of critic and policy", "after the policy's step",
)  # fmt: skip
"""Those of dying_rl.py."""


def has_waves(iteration: int, count: int) -> Callable[[Path], bool]:
    def is_due(run: Path) -> bool:
        path = run / f"rollouts/iteration_{iteration:08d}.waves.jsonl.zst"
        # Read-only: read_waves would remove what the run has not finished writing.
        return path.exists() and path.read_bytes().count(b"\x28\xb5\x2f\xfd") >= count

    return is_due


KILLS: dict[str, Callable[[Path], bool]] = {
    "after the critic's checkpoint": lambda run: (run / "critic/checkpoints/step_00000002").exists(),
    "before the first wave": lambda run: (run / "checkpoints/step_00000002").exists(),
    "between waves": has_waves(1, 1),
    "while it scores": has_waves(1, 2),
    "when all is scored": lambda run: (run / "rollouts/iteration_00000001.jsonl.zst").exists(),
    "within an iteration": has_step(3),
    "after a checkpoint within an iteration": lambda run: (run / "checkpoints/step_00000003").exists(),
}


@pytest.mark.slow(minutes=3)
@pytest.mark.parametrize("kill", KILLS)
def test_the_same_command_continues_to_the_bit_after_kill_9(
    kill: str, workers: Workers, start: Path, problems: Path, tmp_path: Path, whole: Callable
) -> None:
    unbroken = whole("ppo", PPO)
    saving = {"checkpoint": {"save_interval": 1 if "checkpoint within" in kill else 2}}
    recipe = write_recipe(rl_recipe(start, problems, tmp_path / "run", **merged(THINKING, PPO, saving)))
    workers.run_and_kill(PROGRAM, [str(recipe)], lambda: KILLS[kill](tmp_path / "run"))
    workers.run(PROGRAM, [str(recipe)], 1)
    assert_same(tmp_path / "run", unbroken)


@pytest.mark.slow(minutes=3)
@pytest.mark.parametrize("phase", PHASES)
def test_the_same_command_continues_to_the_bit_after_kill_9_inside_of(
    phase: str, workers: Workers, start: Path, problems: Path, tmp_path: Path, whole: Callable
) -> None:
    recipe = write_recipe(rl_recipe(start, problems, tmp_path / "run", **merged(THINKING, PPO)))
    with pytest.raises(AssertionError, match="ended with code -9"):
        workers.run("dying_rl", [str(recipe), f"--kill={phase}"], 1)
    assert len(rollouts_of(tmp_path / "run")) == (2 if "step" in phase else 1)
    workers.run(PROGRAM, [str(recipe)], 1)
    assert_same(tmp_path / "run", whole("ppo", PPO))


@pytest.mark.slow(minutes=1)
def test_killed_graders_cost_no_reward(
    workers: Workers, start: Path, problems: Path, tmp_path: Path, whole: Callable
) -> None:
    recipe = write_recipe(rl_recipe(start, problems, tmp_path / "run", **merged(THINKING, PPO)))
    said = workers.run("dying_rl", [str(recipe), "--kill=graders"], 1)
    assert said.count("killed a grader") == 4, "one of every wave"
    assert_same(tmp_path / "run", whole("ppo", PPO))


def assert_same(run: Path, unbroken: Path) -> None:
    """The counts add up, and everything is that of the unbroken run."""
    for number, iteration in enumerate(rollouts_of(run)):
        places = Counter((row["position"], row["sample"]) for row in iteration)
        assert places == Counter((4 * number + b // 8, b % 8) for b in range(32))
        assert all(row["reason"] != "crash" for row in iteration)
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == [1, 2, 3, 4]
    assert any(row["rewards"]["rl_runs:share_of_fours"] for iteration in rollouts_of(run) for row in iteration)
    assert rollouts_of(run) == rollouts_of(unbroken)
    assert learned(run) == learned(unbroken)


@pytest.mark.slow(minutes=1)
def test_an_iteration_whose_rollouts_are_gone_is_not_sampled_with_other_weights(
    workers: Workers, start: Path, problems: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(rl_recipe(start, problems, tmp_path / "run", checkpoint={"save_interval": 1}))
    workers.run_and_kill(PROGRAM, [str(recipe)], lambda: (tmp_path / "run/checkpoints/step_00000001").exists())
    shutil.rmtree(tmp_path / "run/rollouts")
    with pytest.raises(AssertionError, match="lacks the rollouts of iteration 0, within which the run resumes"):
        workers.run(PROGRAM, [str(recipe)], 1)
