"""Rewards of rollouts: what they consist of, and that a killed grader is no wrong answer."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rl_runs import rl_recipe

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.problems import Problem
from megatron_tpt.recipes.rl import RLRecipe
from megatron_tpt.rl.experience import Sample
from megatron_tpt.rl.outcomes import Rewarder
from megatron_tpt.rl.prompts import Prompt
from megatron_tpt.rl.rollouts import Rollout, RolloutKey

REWARDS: dict[str, Any] = {
    "format_weight": 0.5, "overlong_buffer": 4, "length_penalty": 0.25, "functions": ["rl_runs:share_of_fours"]
}  # fmt: skip


def recipe_of(**changes: Any) -> RLRecipe:
    raw = rl_recipe(Path("/nowhere"), Path("problems.jsonl"), Path("run"), **changes)
    del raw["training"]["init_from"]
    recipe = recipe_from_dict(RLRecipe, raw)
    assert isinstance(recipe, RLRecipe)
    return recipe


@pytest.fixture(scope="module")
def rewarder() -> Iterator[Rewarder]:
    with Rewarder(recipe_of(rewards=REWARDS, rollouts={"max_new_tokens": 8})) as rewarder:
        yield rewarder


def grade(rewarder: Rewarder, *texts: str, length: int = 2) -> list[Sample]:
    prompt = Prompt(Problem("4", "after four", "five", "problems.jsonl:5"), "after four", (12, 8))
    ids = tuple(range(length))
    rollouts = [
        Rollout(RolloutKey("7", number), text, ids, (-0.5,) * length, 3, False) for number, text in enumerate(texts)
    ]
    return rewarder.grade([(7, prompt, one) for one in rollouts])


def test_the_reward_is_the_sum_of_what_a_recipe_names(rewarder: Rewarder) -> None:
    right, wrong, formed = grade(rewarder, "five", "four four", "<think> so </think> five")
    assert right.rewards == {
        "correct": 1.0, "format": 0.0, "overlong": 0.0, "length": -0.0625, "rl_runs:share_of_fours": 0.0
    }  # fmt: skip
    assert wrong.rewards["correct"] == wrong.rewards["length"] == 0 and wrong.rewards["rl_runs:share_of_fours"] == 0.5
    assert wrong.reason == "different" and right.reason is None
    assert formed.rewards["format"] == 0.5 and formed.is_correct
    [long] = grade(rewarder, "five", length=6)
    assert long.rewards["overlong"] == -0.5
    assert (right.position, right.sample, right.prompt_id, right.weight_version) == (7, 0, "4", 3)


def test_a_killed_grader_makes_no_answer_wrong(rewarder: Rewarder) -> None:
    grade(rewarder, "five")
    graders = [
        one for one in psutil.Process().children() if one.is_running() and "spawn_main" in "".join(one.cmdline())
    ]
    assert graders
    for one in graders:
        os.kill(one.pid, signal.SIGKILL)
    assert [one.is_correct for one in grade(rewarder, "five", "six", "five")] == [True, False, True]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rl_runs:nothing"], r"there is no rl_runs:nothing: write package\.module:function"),
        (["rl_runs:of_two"], r"rl_runs:of_two must take prompt, response and answer: too many positional arguments"),
        (["rl_runs:share_of_fours", "rl_runs:share_of_fours"], "share_of_fours is there twice: remove one of them"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_anything_starts(names: list[str], message: str) -> None:
    recipe = recipe_of(rewards={"functions": names})
    for refuse in (lambda: recipe.check_callbacks({}), lambda: Rewarder(recipe)):
        with pytest.raises(UserError, match=message):
            refuse()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("failing", r"rl_runs:failing has failed after prompt 4 \(.*rl_runs\.py:\d+: KeyError: 'five'\): fix it there"),
        ("speechless", "rl_runs:speechless has returned None after prompt 4: it must return a number"),
        ("undefined", "rl_runs:undefined has returned nan after prompt 4: it must return a number"),
    ],
)
def test_a_function_that_gives_no_number_is_named(name: str, message: str) -> None:
    """A reward that is not finite would make all advantages of its group so."""
    recipe = recipe_of(rewards={"functions": [f"rl_runs:{name}"]})
    with Rewarder(recipe) as rewarder, pytest.raises(UserError, match=message):
        grade(rewarder, "five")
