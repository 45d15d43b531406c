"""What policies do with the problems: accuracy, tokens of thinking beyond the minimum, and curves of J.

python examples/repro_demo/measure_policies.py --models DIR ... --names NAME ... --problems FILE --output FOLDER

Answers are sampled at temperature 1, as in training, and graded as there. J is the mean log-probability of the tokens
of the right answer after 0, 1, ... right steps of thinking, behind the text that closes the thinking; its curves are of
the problems with the most legs. Writes FOLDER/policies.json.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from parcels import LENGTHS, Route, read_rows, think

from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.fields import PositiveInt
from megatron_tpt.errors import require
from megatron_tpt.files import write_json
from megatron_tpt.generation import (
    Completion,
    Engine,
    EngineOptions,
    Request,
    Sampling,
    ScoringRequest,
    derive_seed,
    expect_completion,
    load_tokenizer,
    log_likelihoods,
    open_engine,
)
from megatron_tpt.grading import Grader, Item, Reading, Rules
from megatron_tpt.think_tags import CLOSE_TAG

ANSWER = "Answer:"
MAX_TOKENS = 80
"""Of an answer with its thinking: rollouts.max_new_tokens of rl.yaml."""


@dataclass(frozen=True)
class MeasureOptions:
    """Which policies to measure, on which problems."""

    models: list[Path]
    """Model folders of tools/export_hf.py."""
    names: list[str]
    """What they are called in the results."""
    problems: Path
    """problems.jsonl of parcels.py."""
    output: Path
    """The folder for policies.json."""
    num_samples: PositiveInt = 4
    """Answers to every problem."""
    seed: int = 0
    """Decides the answers that are sampled."""

    def __post_init__(self) -> None:
        require(len(self.models) == len(self.names), f"--names: {len(self.names)} names for {len(self.models)} models")


@dataclass(frozen=True)
class Answered:
    """A problem, over its samples."""

    id: str
    num_legs: int
    accuracy: float
    extra_tokens: float
    """Tokens of the thinking beyond those of a step for every leg; fewer than 0 where the policy answers earlier."""
    early: float
    """The share of samples whose thinking lacks the step of a leg."""


class Measure:
    """Measures one policy."""

    def __init__(self, engine: Engine, tokenizer: Any, options: MeasureOptions) -> None:
        self._engine, self._tokenizer, self._options = engine, tokenizer, options
        self._grader = Grader(Rules("exact", Reading(pattern=f"{ANSWER} (.*)")))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def answers(self, routes: Sequence[Route]) -> Iterator[Answered]:
        """Sampled answers to all problems."""
        written: dict[Route, list[Completion]] = {route: [] for route in routes}
        for request, outcome in self._engine.generate(self._requests(routes)):
            written[request.key].append(expect_completion(outcome))
        for route, completions in written.items():
            yield self._answered(route, completions)

    def _requests(self, routes: Sequence[Route]) -> Iterator[Request]:
        for route in routes:
            for sample in range(self._options.num_samples):
                seed = derive_seed(self._options.seed, "measure", route.question, sample)
                sampling = Sampling(1.0, 1.0, MAX_TOKENS, seed=seed)
                yield Request(self._encode(route.question), sampling, route)

    def _answered(self, route: Route, completions: Sequence[Completion]) -> Answered:
        needed = self._num_thinking(self._encode(think(route.steps)))
        thoughts = [one.text.partition(CLOSE_TAG)[0] for one in completions]
        return Answered(
            route.problem["id"],
            len(route.num_days),
            fmean(self._grader.grade(Item(one.text, route.right_answer)).correct for one in completions),
            fmean(self._num_thinking(one.token_ids) - needed for one in completions),
            fmean(not all(f"\n{leg} " in thought for leg in route.legs) for thought in thoughts),
        )

    def _num_thinking(self, ids: Sequence[int]) -> int:
        """Tokens before the end of the thinking; all where it does not end."""
        [close] = self._encode(CLOSE_TAG)
        return list(ids).index(close) if close in ids else len(ids)

    def curve(self, routes: Sequence[Route]) -> list[list[float]]:
        """J of every problem after 0, 1, ... all steps."""
        requests = [
            ScoringRequest(
                self._encode(route.question + think(route.steps[:num_steps]) + ANSWER),
                self._encode(f" {route.right_answer}"),
            )
            for route in routes
            for num_steps in range(LENGTHS[-1] + 1)
        ]
        values = [fmean(one.log_probabilities) for one in log_likelihoods(self._engine, requests)]
        points = LENGTHS[-1] + 1
        return [values[place : place + points] for place in range(0, len(values), points)]


def measure(options: MeasureOptions) -> None:
    """Measure all policies, one after the other."""
    routes = [Route.from_document(row["prompt"]) for row in read_rows(options.problems)]
    longest = [route for route in routes if len(route.num_days) == LENGTHS[-1]]
    results = []
    for name, model in zip(options.names, options.models, strict=True):
        engine_options = EngineOptions(str(model), max_model_len=128, dtype="float32")
        with open_engine(engine_options, needs=["log-likelihood"]) as engine:
            one = Measure(engine, load_tokenizer(str(model)), options)
            problems = list(one.answers(routes))
            results.append(
                {
                    "name": name,
                    "accuracy": fmean(problem.accuracy for problem in problems),
                    "extra_tokens": fmean(problem.extra_tokens for problem in problems),
                    "num_answers": len(problems) * options.num_samples,
                    "num_problems": len(problems),
                    "problems": list(map(asdict, problems)),
                    "curves": one.curve(longest),
                }
            )
    write_json(options.output / "policies.json", {"seed": options.seed, "policies": results})


if __name__ == "__main__":
    run(lambda: measure(parse(MeasureOptions, description=__doc__)))
