"""The rewards of rollouts: whether the answer is right, and what a recipe adds to that."""

import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from megatron_tpt.errors import UserError, require
from megatron_tpt.grading import Grade, GraderPool, Item, opens_thinking
from megatron_tpt.rl.experience import CORRECT, Sample
from megatron_tpt.rl.prompts import Prompt, grading_rules
from megatron_tpt.rl.rewards import format_reward, length_penalty, overlong_penalty
from megatron_tpt.rl.rollouts import Rollout
from megatron_tpt.training.recipe_callbacks import import_module

if TYPE_CHECKING:
    from megatron_tpt.recipes.rl import RLRecipe

RewardFunction = Callable[[str, str, Any], float]
"""(prompt, response, right answer) -> what is added to the reward."""


class Rewarder:
    """Grades in worker processes, see GraderPool; use it as a context manager. Raises UserError for functions that
    there are not, and answers that cannot be graded."""

    def __init__(self, recipe: "RLRecipe") -> None:
        self._settings, self._max_length = recipe.rewards, recipe.rollouts.max_new_tokens
        self._functions = reward_functions(recipe.rewards.functions)
        self._pool = GraderPool(grading_rules(recipe), recipe.rewards.num_workers, recipe.rewards.time_limit_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.close()

    def grade(self, graded: Sequence[tuple[int, Prompt, Rollout]]) -> list[Sample]:
        """The samples of rollouts, each with the position of its prompt and the prompt."""
        grades = self._grades(
            [
                Item(
                    rollout.text,
                    prompt.problem.answer,
                    prompt.problem.choices,
                    opens_thinking(prompt.text),
                    prompt.problem.code_prefix,
                )
                for _, prompt, rollout in graded
            ]
        )
        samples = [
            Sample(
                position,
                rollout.key.sample,
                prompt.problem.id,
                prompt.text,
                list(prompt.token_ids),
                rollout.text,
                list(rollout.token_ids),
                list(rollout.log_probabilities),
                rollout.weight_version,
                rollout.is_truncated,
                prompt.problem.answer,
                grade.reason,
                {CORRECT: float(grade.correct)},
            )
            for (position, prompt, rollout), grade in zip(graded, grades, strict=True)
        ]
        self._add(samples)
        return samples

    def _grades(self, items: Sequence[Item]) -> list[Grade]:
        """Those of items; where a grader crashed, by a second one: it may have been killed, and an answer that crashes
        graders does so again."""
        grades = self._pool.grade(items)
        crashed = [place for place, grade in enumerate(grades) if grade.reason == "crash"]
        for place, grade in zip(crashed, self._pool.grade(items[place] for place in crashed), strict=True):
            grades[place] = grade
        return grades

    def _add(self, samples: Sequence[Sample]) -> None:
        """Add the rewards other than the answer's to all samples."""
        settings, added = self._settings, dict[str, Sequence[float]]()
        lengths = torch.tensor([len(one.token_ids) for one in samples])
        is_correct = torch.tensor([one.is_correct for one in samples], dtype=torch.bool)
        if weight := settings.format_weight:
            added["format"] = [weight * format_reward(one.text, opens_thinking(one.prompt)) for one in samples]
        if buffer := settings.overlong_buffer:
            penalty = overlong_penalty(
                lengths, max_length=self._max_length, buffer=buffer, factor=settings.overlong_factor
            )
            added["overlong"] = penalty.tolist()
        if factor := settings.length_penalty:
            added["length"] = length_penalty(lengths, is_correct, max_length=self._max_length, factor=factor).tolist()
        for name, function in self._functions.items():
            added[name] = [_value(name, function, one) for one in samples]
        for name, values in added.items():
            for one, value in zip(samples, values, strict=True):
                one.rewards[name] = value


def reward_functions(names: Sequence[str]) -> dict[str, RewardFunction]:
    """The functions of a recipe, by name. Raises UserError for one that there is not, that cannot be called as it
    will be, or that is named twice."""
    functions: dict[str, RewardFunction] = {}
    for name in names:
        require(name not in functions, f"rewards.functions: {name} is there twice: remove one of them")
        functions[name] = _find(name)
    return functions


def _find(name: str) -> RewardFunction:
    module, colon, function_name = name.partition(":")
    function = getattr(import_module(module), function_name, None) if colon else None
    if not callable(function):
        raise UserError(f"rewards.functions: there is no {name}: write package.module:function")
    try:
        inspect.signature(function).bind("prompt", "response", "answer")
    except ValueError:  # one in C may not say what it takes
        pass
    except TypeError as error:
        raise UserError(f"rewards.functions: {name} must take prompt, response and answer: {error}") from None
    return function


def _value(name: str, function: RewardFunction, sample: Sample) -> float:
    """What a function gives for a rollout. Raises UserError where that is no number."""
    try:
        given = function(sample.prompt, sample.text, sample.answer)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"rewards.functions: {name} has failed after prompt {sample.prompt_id} "
            f"({last.filename}:{last.lineno}: {type(error).__name__}: {error}): fix it there"
        ) from error
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    require(
        math.isfinite(value),
        f"rewards.functions: {name} has returned {str(given)[:60]} after prompt {sample.prompt_id}: it must return a "
        f"number",
    )
    return value
