"""What a study's YAML file says: factors, the steps that they expand to, results, budget. docs/studies.md teaches it.

factors:
  data: {plain: {path: plain.jsonl}, thought: {path: thought.jsonl}}
  seed: [0, 1, 2]
steps:
  train: {command: [train.py, --data, "{data.path}", --seed, "{seed}", --output, "{output}"]}
  test:
    command: [test.py, --model, "{train}", --output, "{output}"]
    results: {file: results.json, metrics: {accuracy: accuracy}}
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tpt.config.convert import expected, from_yaml
from megatron_tpt.config.fields import PositiveFloat
from megatron_tpt.config.yaml_file import load_yaml
from megatron_tpt.errors import UserError

NAME = r"[A-Za-z_][\w-]*"
"""Names of factors and steps, which may be in braces."""
_COLUMNS = (
    "row", "rows", "metric", "value", "trials", "trained_tokens", "generated_tokens", "flops", "hours", "source",
    "checksum", "mean", "low", "high", "n", "p",
)  # fmt: skip
"""The tables of the report have them beside those of the factors."""


@dataclass(frozen=True)
class Cost:
    """What a step costs: numbers, or arithmetic on numbers, {PLACEHOLDERS} and the words tokens and prompt_tokens."""

    tokens: float | str | None = None
    """Tokens trained on, or generated. Of our training programs the recipe says it."""
    prompt_tokens: float | str | None = None
    """Tokens that a generator reads. They are in no sum of tokens; its FLOPs may depend on them."""
    flops: float | str | None = None
    """Floating-point operations. Of our training programs the recipe says it."""
    hours: float | str | None = None
    """Wall-clock hours. By default the mean of the finished runs of the step."""
    generated: bool = False
    """Its tokens are generated, not trained on: they are reported apart."""
    measured_tokens: str | None = None
    """FILE:KEY.KEY: where the step's output says how many tokens there were, as in statistics.json:thinking.total."""


@dataclass(frozen=True)
class Results:
    """The figures that a step leaves."""

    metrics: dict[str, str]
    """Their names, and where each is in the file: KEY.KEY, with numbers for the places of lists."""
    file: str = "results.json"
    """A JSON file in the step's {output}."""
    rows: str | None = None
    """KEY.KEY of a list of objects, each a row of results with its own metrics. By default the file is one row."""
    factors: list[str] = field(default_factory=list)
    """Fields of a row that are factors, too."""
    trials: dict[str, str] = field(default_factory=dict)
    """METRIC: KEY.KEY of the number of problems that it is a share of, as of an accuracy. Its intervals end at 0 and 1;
    with a single seed, they are over the problems."""
    shares: dict[str, float | str] = field(default_factory=dict)
    """STEP: the part of its cost that this result takes, as of an earlier checkpoint: "{at.step} / 600"."""


@dataclass(frozen=True)
class StepConfig:
    """A command, run once for every combination of the factors that it and the steps before it mention."""

    command: list[str]
    """Arguments of python. {FACTOR} is a level's name, {FACTOR.KEY} what the level holds, {STEP} the output of another
    step, {output} where this one writes."""
    over: list[str] = field(default_factory=list)
    """Factors that it takes all levels of at once: a word with {STEP} becomes several."""
    only: dict[str, list[str]] = field(default_factory=dict)
    """FACTOR: the levels with which its results are wanted; by default all."""
    inputs: list[str] = field(default_factory=list)
    """Files and folders that it reads, in addition to those in its command: a change runs it again."""
    code: list[str] = field(default_factory=list)
    """Python files and folders that it runs, in addition to what its program imports."""
    version: int = 1
    """Raise it to run the step again."""
    outputs: list[str] = field(default_factory=list)
    """What must be in its {output} once it has ended."""
    clean: bool = False
    """Remove what an interrupted run left before it runs again. By default the command resumes by itself."""
    launcher: list[str] = field(default_factory=list)
    """What starts python, as in [srun]. Not part of the step's key, like `scale`."""
    scale: dict[str, Any] = field(default_factory=dict)
    """SLURM: resources of this step's jobs, as in {gpus_per_task: 8, time_limit: "04:00:00"}."""
    cost: Cost | None = None
    results: Results | None = None


@dataclass(frozen=True)
class ResultBudget:
    """What results must take, each with all steps before it: arms of equal tokens, or of equal compute."""

    only: dict[str, list[str]] = field(default_factory=dict)
    """FACTOR: the levels of the results that this is about; by default all."""
    trained_tokens: PositiveFloat | None = None
    """Tokens that are trained on."""
    tokens: PositiveFloat | None = None
    """Tokens that are trained on or generated."""
    flops: PositiveFloat | None = None
    """FLOPs, those of generation included."""
    tolerance: PositiveFloat = 0.02
    """By how large a share a result may differ from these."""


@dataclass(frozen=True)
class Budget:
    """What may be spent. A study that would exceed it does not start."""

    tokens: PositiveFloat | None = None
    """Tokens of the whole study, trained on and generated."""
    flops: PositiveFloat | None = None
    """FLOPs of the whole study, those of generation included."""
    hours: PositiveFloat | None = None
    """Hours of all steps together."""
    results: list[ResultBudget] = field(default_factory=list)


@dataclass(frozen=True)
class Claim:
    """That the mean of some results minus that of others is between two limits. The report says whether it is."""

    text: str
    """As the report has it."""
    of: dict[str, Any]
    """FACTOR: a level, or a list of several: the results with these."""
    minus: dict[str, Any]
    """The same, of the results that they are compared with."""
    metric: str | None = None
    """By default the only one."""
    above: float = 0.0
    """The difference is larger than this."""
    below: float = math.inf
    """It is not larger than this."""

    def __post_init__(self) -> None:
        if not self.above < self.below:
            raise UserError(f"above is {self.above:g}, below {self.below:g}: no difference is between; correct one")


@dataclass(frozen=True)
class ReportConfig:
    """How results are compared."""

    replicate: str = "seed"
    """The factor over which means and intervals are, and by which differences are paired."""
    x: str | None = None
    """A factor whose levels are numbers, for the plots; by default tokens and FLOPs."""
    baseline: dict[str, str] = field(default_factory=dict)
    """FACTOR: the level that others are compared with; by default its first."""
    chance: dict[str, float] = field(default_factory=dict)
    """METRIC: what guessing gives, a line in the plot."""
    claims: list[Claim] = field(default_factory=list)
    """What is to be shown; the report says of each whether it holds, does not hold, or is not decided."""


@dataclass(frozen=True)
class StudyConfig:
    """What a study's YAML file says."""

    title: str
    """Above the report."""
    factors: dict[str, Any]
    """NAME: a list of levels, or a mapping of levels to what {NAME.KEY} stands for."""
    steps: dict[str, StepConfig]
    exclude: list[dict[str, str]] = field(default_factory=list)
    """Combinations that are not wanted, each as {FACTOR: LEVEL, ...}."""
    budget: Budget = field(default_factory=Budget)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        for name in (*self.factors, *self.steps):
            if not re.fullmatch(NAME, name) or name == "output":
                raise UserError(f"{name}: a name of a factor or step has letters, digits, - and _, and is not output")
            if name in ("True", "False"):
                raise UserError(f"{name}: YAML reads on, off, yes and no as truth values: write the name in quotes")
        if both := sorted(set(self.factors) & set(self.steps)):
            raise UserError(f"{both[0]}: is a factor and a step; rename one, as {{{both[0]}}} must mean one of them")
        if not self.steps:
            raise UserError("steps: give at least one")
        for name in self.factors:
            levels_of(self, name)
        for name, step in self.steps.items():
            self._check_factors(f"steps.{name}.over", step.over)
            if len(set(step.over)) < len(step.over):
                raise UserError(f"steps.{name}.over: a factor is there twice; give each once")
            if absolute := [path for path in step.outputs if Path(path).is_absolute()]:
                raise UserError(f"steps.{name}.outputs: {absolute[0]}: give paths within {{output}}")
            for factor, levels in step.only.items():
                self._check_levels(f"steps.{name}.only", factor, levels)
        for number, each in enumerate(self.budget.results):
            for factor, levels in each.only.items():
                self._check_levels(f"budget.results.{number}.only", factor, levels)
        for excluded in self.exclude:
            if not excluded:
                raise UserError("exclude: one is empty; give {FACTOR: LEVEL}, or remove it")
            for factor, level in excluded.items():
                self._check_levels("exclude", factor, [level])
        self._check_report()

    def _check_report(self) -> None:
        """The names in `report` and `results`."""
        results = {name: step.results for name, step in self.steps.items() if step.results is not None}
        factors = [*self.factors, *(factor for each in results.values() for factor in each.factors)]
        metrics = [metric for each in results.values() for metric in each.metrics]
        report = self.report
        for name in factors:
            if name in _COLUMNS:
                raise UserError(f"{name}: is a column of the report; give the factor another name")
        named = [("report.baseline", name) for name in report.baseline] + ([("report.x", report.x)] if report.x else [])
        # Without seeds, the default means nothing.
        named += [("report.replicate", report.replicate)] if report.replicate != ReportConfig.replicate else []
        for where, name in named:
            if name not in factors:
                raise UserError(f"{where}: there is no factor {name}; known are {', '.join(factors)}")
        if report.x == report.replicate:
            raise UserError(f"report.x: {report.x} is report.replicate, over which the means are; give another factor")
        # Of a factor of the study; the levels of others are in the results.
        for factor, level in report.baseline.items():
            if factor in self.factors:
                self._check_levels("report.baseline", factor, [level])
        if report.x in self.factors:
            for level in levels_of(self, report.x):
                as_number(level, report.x)
        for name, each in results.items():
            if not each.metrics:
                raise UserError(f"steps.{name}.results.metrics: give at least one")
            for factor in each.factors:
                if factor in self.factors:
                    raise UserError(f"steps.{name}.results.factors: {factor} is a factor of the study: remove it")
            _check_metrics(f"steps.{name}.results.trials", each.trials, list(each.metrics))
        for name in ("chance", "claims"):
            if getattr(report, name) and not metrics:
                raise UserError(f"report.{name}: no step has results: give one of them")
        _check_metrics("report.chance", report.chance, metrics)
        for number, claim in enumerate(report.claims):
            self._check_claim(f"report.claims.{number}", claim, factors, metrics)

    def _check_claim(self, where: str, claim: Claim, factors: Sequence[str], metrics: Sequence[str]) -> None:
        if claim.metric is not None:
            _check_metrics(f"{where}.metric", [claim.metric], metrics)
        elif len(set(metrics)) != 1:
            raise UserError(f"{where}.metric: give one of {', '.join(metrics)}")
        for name, side in (("of", claim.of), ("minus", claim.minus)):
            if not side:
                raise UserError(f"{where}.{name}: names no factor; give {{FACTOR: LEVEL}}")
            for factor, levels in side.items():
                if factor == self.report.replicate:
                    raise UserError(f"{where}.{name}: {factor} is report.replicate, over which the means are")
                if factor not in factors:
                    raise UserError(f"{where}.{name}: there is no factor {factor}; known are {', '.join(factors)}")
                # Of a factor of the study; the levels of others are in the results.
                if factor in self.factors:
                    self._check_levels(f"{where}.{name}", factor, chosen_levels(levels))

    def _check_factors(self, where: str, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.factors:
                raise UserError(f"{where}: there is no factor {name}; known are {', '.join(self.factors)}")

    def _check_levels(self, where: str, factor: str, levels: Iterable[str]) -> None:
        self._check_factors(where, [factor])
        for level in levels:
            if level not in levels_of(self, factor):
                known = ", ".join(levels_of(self, factor))
                raise UserError(f"{where}: {factor} has no level {level}; known are {known}")


def _check_metrics(where: str, given: Iterable[str], metrics: Sequence[str]) -> None:
    for metric in given:
        if metric not in metrics:
            raise UserError(f"{where}: there is no metric {metric}; known are {', '.join(metrics)}")


def as_number(level: str, factor: str) -> float:
    """The place of a level of report.x in plots. Raises UserError where it is no number."""
    try:
        return float(level)
    except ValueError:
        raise UserError(f"report.x: the level {level!r} of {factor} is no number; choose another factor") from None


def chosen_levels(given: Any) -> list[str]:
    """The levels that a claim names: one, or a list of several."""
    return list(map(str, given if isinstance(given, list) else [given]))


def levels_of(config: StudyConfig, factor: str) -> dict[str, Any]:
    """The levels of a factor by name, each with what it holds. Raises UserError where they are not levels."""
    given = config.factors[factor]
    if isinstance(given, list) and all(isinstance(one, str | int | float) for one in given):
        given = [(level, level) for level in given]
    elif isinstance(given, dict):
        given = list(given.items())
    else:
        given = []
    if not given:
        raise UserError(f"factors.{factor}: give a list of levels, or a mapping of levels to what they hold")
    # As the file has them: true, and not Python's True.
    levels = {str(name).lower() if isinstance(name, bool) else str(name): value for name, value in given}
    if "" in levels:
        raise UserError(f"factors.{factor}: a level has no name: give it one")
    if len(levels) < len(given):
        raise UserError(f"factors.{factor}: a level is there twice; give each once")
    return levels


def load_study(path: Path) -> StudyConfig:
    """Read a study file. Raises UserError for all that is wrong in it, each with its line."""
    try:
        content, places = load_yaml(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give a study file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a study; it has {expected(StudyConfig)}")
    return from_yaml(StudyConfig, content, places, path)
