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

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tpt.config.convert import Converter, expected
from megatron_tpt.config.fields import PositiveFloat
from megatron_tpt.config.yaml_file import Key, load_yaml, place_of
from megatron_tpt.errors import UserError

NAME = r"[A-Za-z_][\w-]*"
"""Names of factors and steps, which may be in braces."""
_COLUMNS = [
    "row",
    "rows",
    "metric",
    "value",
    "trials",
    "trained_tokens",
    "generated_tokens",
    "flops",
    "hours",
    "source",
    "checksum",
    "mean",
    "low",
    "high",
    "n",
    "p",
]
"""The tables of the report have them beside those of the factors."""


@dataclass(frozen=True)
class Cost:
    """What a step costs: numbers, or arithmetic on numbers, {PLACEHOLDERS} and, after `tokens`, the word tokens."""

    tokens: float | str | None = None
    """Tokens trained on, or generated. Of our training programs the recipe says it."""
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
    trials: str | None = None
    """KEY.KEY of the number of problems that a share is of: with a single seed, the interval is over these."""
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
class Budget:
    """What may be spent. A study that would exceed it does not start."""

    tokens: PositiveFloat | None = None
    """Tokens of the whole study, trained on and generated."""
    flops: PositiveFloat | None = None
    """FLOPs of the whole study, those of generation included."""
    hours: PositiveFloat | None = None
    """Hours of all steps together."""
    result_tokens: PositiveFloat | None = None
    """Tokens that every result must take, those of the steps before it and generated ones included."""
    result_flops: PositiveFloat | None = None
    """FLOPs that every result must take: arms of equal compute."""
    tolerance: PositiveFloat = 0.02
    """By how large a share a result may differ from these."""


@dataclass(frozen=True)
class ReportConfig:
    """How results are compared."""

    replicate: str = "seed"
    """The factor over which means and intervals are, and by which differences are paired."""
    x: str | None = None
    """A factor whose levels are numbers, for the plots; by default tokens and FLOPs."""
    baseline: dict[str, str] = field(default_factory=dict)
    """FACTOR: the level that others are compared with; by default its first."""
    bounds: dict[str, list[float]] = field(default_factory=dict)
    """METRIC: [lowest, highest]: intervals end there, as in accuracy: [0, 1]."""
    chance: dict[str, float] = field(default_factory=dict)
    """METRIC: what guessing gives, a line in the plot."""

    def __post_init__(self) -> None:
        for metric, bounds in self.bounds.items():
            if len(bounds) != 2 or bounds[0] >= bounds[1]:
                raise UserError(f"report.bounds: {metric}: {bounds} must be two numbers, as in [0, 1]")


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
        of_rows = [name for step in self.steps.values() if step.results for name in step.results.factors]
        for name in (*self.factors, *of_rows):
            if name in _COLUMNS:
                raise UserError(f"{name}: is a column of the report; give the factor another name")
        if both := sorted(set(self.factors) & set(self.steps)):
            raise UserError(f"{both[0]}: is a factor and a step; rename one, as {{{both[0]}}} must mean one of them")
        if not self.steps:
            raise UserError("steps: give at least one")
        for name in self.factors:
            levels_of(self, name)
        for name, step in self.steps.items():
            self._check_factors(f"steps.{name}.over", step.over)
            for factor, levels in step.only.items():
                self._check_levels(f"steps.{name}.only", factor, levels)
            if unknown := sorted(set(step.results.shares if step.results else ()) - set(self.steps)):
                raise UserError(f"steps.{name}.results.shares: there is no step {unknown[0]}")
        for excluded in self.exclude:
            for factor, level in excluded.items():
                self._check_levels("exclude", factor, [level])
        for factor, level in self.report.baseline.items():
            if factor in self.factors:  # others are fields of rows
                self._check_levels("report.baseline", factor, [level])

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


def levels_of(config: StudyConfig, factor: str) -> dict[str, Any]:
    """The levels of a factor by name, each with what it holds. Raises UserError where they are not levels."""
    given = config.factors[factor]
    if isinstance(given, list) and given and all(isinstance(one, str | int | float) for one in given):
        levels = {str(level): level for level in given}
        if len(levels) < len(given):
            raise UserError(f"factors.{factor}: a level is there twice; give each once")
        return levels
    if isinstance(given, dict) and given:
        return {str(name): value for name, value in given.items()}
    raise UserError(f"factors.{factor}: give a list of levels, or a mapping of levels to what they hold")


@dataclass(frozen=True)
class SeedsConfig:
    """The short form: one command, run with several seeds. It writes `points`, see results.Point."""

    title: str
    """Above the report."""
    command: list[str]
    """Arguments of python; {seed} and {output} are filled in for every seed."""
    seeds: Any
    """The seeds to run."""
    results: str = "report/results.json"
    """The results file that the command leaves, relative to its {output}."""
    chance: float | None = None
    """Accuracy of guessing, drawn as a line."""
    clean: bool = False
    """See StepConfig.clean."""

    def __post_init__(self) -> None:
        for name in ("{seed}", "{output}"):
            if not any(name in word for word in self.command):
                raise UserError(f"command: {name} must be in it, or all runs would be the same")

    def as_study(self) -> StudyConfig:
        """The study of one step."""
        results = Results({"accuracy": "accuracy"}, self.results, "points", ["arm", "tokens"], "num_problems")
        chance = {} if self.chance is None else {"accuracy": self.chance}
        report = ReportConfig(x="tokens", bounds={"accuracy": [0, 1]}, chance=chance)
        step = StepConfig(self.command, clean=self.clean, results=results)
        return StudyConfig(self.title, {"seed": self.seeds}, {"run": step}, report=report)


def load_study(path: Path) -> StudyConfig:
    """Read a study file. Raises UserError for all that is wrong in it, each with its line."""
    try:
        content, places = load_yaml(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give a study file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a study; it has {expected(StudyConfig)}")
    kind = SeedsConfig if "command" in content or "seeds" in content else StudyConfig
    converter = Converter(lambda key: f"{place_of(places, key) or path}: ", lambda key: _known(kind, key))
    config = converter.section(kind, content, ())
    converter.raise_problems()
    try:
        return config.as_study() if isinstance(config, SeedsConfig) else config
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _known(kind: type, key: Key) -> str:
    sections: dict[str, type] = {"budget": Budget, "report": ReportConfig, "cost": Cost, "results": Results}
    if len(key) > 1:
        inner = [sections[name] for name in key[:-1] if isinstance(name, str) and name in sections]
        kind = inner[-1] if inner else StepConfig
    return f"; known are {', '.join(one.name for one in dataclasses.fields(kind))}"
