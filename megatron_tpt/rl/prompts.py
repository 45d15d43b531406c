"""The prompts of a run: rows with a problem and its right answer, as tokens, in an endless order of their own."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from megatron_tpt.config.rl import can_be_appended
from megatron_tpt.errors import UserError, require
from megatron_tpt.evaluation.benchmark import Benchmark
from megatron_tpt.evaluation.problems import Problem, read_problems
from megatron_tpt.generation import begin_ids, load_tokenizer, render_chat
from megatron_tpt.grading import Grader, Reading, Rules
from megatron_tpt.rl.start import engine_folder

if TYPE_CHECKING:  # this imports torch
    from megatron_tpt.recipes.rl import RLRecipe
    from megatron_tpt.training.data import TrainingData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A problem as the model continues it."""

    problem: Problem
    text: str
    token_ids: tuple[int, ...]


class Prompts:
    """All prompts, in an order that is another one in every epoch."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts = list(prompts)
        self._seed = seed
        self._order: tuple[int, Any] | None = None  # of the epoch asked for last
        digest = hashlib.sha256()
        for one in prompts:
            digest.update(json.dumps([one.token_ids, one.problem.answer]).encode())
        self.checksum = f"sha256:{digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, position: int) -> Prompt:
        """The prompt at a position of the endless sequence of all epochs."""
        epoch, place = divmod(position, len(self))
        if self._order is None or self._order[0] != epoch:
            random = numpy.random.RandomState((self._seed + epoch) % 2**32)
            self._order = epoch, random.permutation(len(self))
        return self._prompts[int(self._order[1][place])]

    def probes(self, most: int = 2, among: int = 256) -> list[tuple[int, ...]]:
        """A few prompts of different lengths, the longest first: those that engine and trainer are compared on."""
        by_length = sorted((one.token_ids for one in self._prompts[:among]), key=len)
        return [by_length[-1], *by_length[: most - 1]]

    def identity(self, num_samples: int) -> dict[str, str]:
        """TrainingData.identity."""
        return {"content of data.train": self.checksum}


def read_prompts(recipe: "RLRecipe") -> Prompts:
    """The prompts of a recipe whose engine folder is there. Raises UserError for rows that are none, and for prompts
    that are too long."""
    data, limit = recipe.data, recipe.training.sequence_length - recipe.rollouts.max_new_tokens
    tokenizer = load_tokenizer(str(engine_folder(recipe)))
    begin = [] if data.chat else begin_ids(tokenizer)
    prompts, longest = [], 0
    for problem in recipe.problems:
        text = problem.prompt
        if data.chat:
            text = render_chat(tokenizer, [{"role": "user", "content": text}])
        ids = (*begin, *tokenizer(text, add_special_tokens=False).input_ids)
        if not ids:
            raise UserError(f"{problem.where}: the prompt has no token; remove the row")
        longest = max(longest, len(ids))
        prompts.append(Prompt(problem, text, ids))
    fitting = [one for one in prompts if len(one.token_ids) <= limit]
    advice = (
        f"{len(prompts) - len(fitting)} of {len(prompts)} prompts have more than {limit} tokens (the longest "
        f"{longest}), which is what rollouts.max_new_tokens={recipe.rollouts.max_new_tokens} leaves of "
        f"training.sequence_length={recipe.training.sequence_length}"
    )
    require(bool(fitting), f"{advice}: raise that, or lower rollouts.max_new_tokens")
    if len(fitting) < len(prompts) and data.on_too_long == "stop":
        raise UserError(f"{advice}: raise that, or give --data.on_too_long=skip")
    if len(fitting) < len(prompts):
        logger.warning(f"{advice}: they are skipped (data.on_too_long)")
    return Prompts(fitting, recipe.run.seed)


def problems_of(recipe: "RLRecipe") -> list[Problem]:
    """The rows of data.train."""
    data = recipe.data
    return [
        problem
        for source in data.train
        for problem in read_problems(
            Benchmark(
                data=source,
                prompt_column=data.prompt_column,
                answer_column=data.answer_column,
                id_column=data.id_column,
                prompt_template=data.prompt_template,
            )
        )
    ]


def check_answers(recipe: "RLRecipe") -> None:
    """Raise UserError for a right answer that data.answer_type cannot read."""
    grader = Grader(grading_rules(recipe))
    for problem in recipe.problems:
        if grader.reference(problem.answer, problem.choices) is None:
            raise UserError(
                f"{problem.where}: the right answer {str(problem.answer)[:60]!r} is none of "
                f"data.answer_type={recipe.data.answer_type}: fix it, or give another type"
            )
        if recipe.repro.enabled and not _names_an_answer(recipe, problem.answer):
            raise UserError(
                f"{problem.where}: repro.enabled=true appends the right answer as a model would write it, which "
                f"{str(problem.answer)[:60]!r} is not: give a data.answer_column with the answer alone"
            )


def _names_an_answer(recipe: "RLRecipe", answer: Any) -> bool:
    """Whether an answer is what a model would write: not the number of an option."""
    return can_be_appended(answer) and (isinstance(answer, str) or recipe.data.answer_type != "choice")


def grading_rules(recipe: "RLRecipe") -> Rules:
    """How the answers of rollouts are graded."""
    data = recipe.data
    return Rules(data.answer_type, Reading(pattern=data.answer_pattern), data.allow_unsandboxed_code)


def build_prompt_data(recipe: "RLRecipe", prompts: Prompts) -> "TrainingData":
    """What the trainer needs to know of the prompts. Its batches come from the rollouts, so its loader is empty. Needs
    process groups."""
    from megatron_tpt.training.data import TrainingData, make_loader

    tokenizer = recipe.read_tokenizer()
    assert tokenizer is not None
    return TrainingData(
        train=make_loader([], recipe),  # type: ignore[arg-type]
        validation={},
        tokenizer_path=recipe.tokenizer_path,
        tokenizer_fingerprint=tokenizer.fingerprint,
        has_segments=True,
        identity=prompts.identity,
    )
