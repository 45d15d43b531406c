"""A study: one command, run with several seeds; then the table and the picture over all of them.

title: ...
command: [examples/demo/run.py, --seed, "{seed}", --output, "{output}"]
results: report/results.json        # what each run leaves in its {output}
seeds: [0, 1, 2]
"""

import dataclasses
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt.config.convert import Converter, expected
from megatron_tpt.config.yaml_file import load_yaml, place_of
from megatron_tpt.errors import UserError
from megatron_tpt.files import write_json
from megatron_tpt.jobs.settings import describe_changes, read_settings
from megatron_tpt.studies.options import StudyOptions
from megatron_tpt.studies.report import write_report
from megatron_tpt.studies.results import Point, read_points, summarize

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyConfig:
    """What a study's YAML file says."""

    title: str
    """Above the table and the picture."""
    command: list[str]
    """Arguments of python; {seed} and {output} are filled in for every seed."""
    seeds: list[int]
    """The seeds to run."""
    results: str = "report/results.json"
    """The results file that the command leaves, relative to its {output}."""
    chance: float | None = None
    """Accuracy of guessing, drawn as a line."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("seeds: give at least one, each once")
        for name in ("{seed}", "{output}"):
            if not any(name in word for word in self.command):
                raise UserError(f"command: {name} must be in it, or all runs would be the same")


def load_study(path: Path) -> StudyConfig:
    """Read a study file. Raises UserError for what is wrong in it."""
    try:
        content, places = load_yaml(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give a study file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a study; it has {expected(StudyConfig)}")
    known = ", ".join(field.name for field in dataclasses.fields(StudyConfig))
    converter = Converter(lambda key: f"{place_of(places, key) or path}: ", lambda key: f"; known are {known}")
    config = converter.section(StudyConfig, content, ())
    converter.raise_problems()
    return config


def run_study(options: StudyOptions) -> list[Point]:
    """Run the command once per seed, one after another, and report. A seed that has its results is not run again,
    if they came from the same study file."""
    config = load_study(options.study)
    settings = options.output / "study.json"
    wanted = {"command": config.command, "results": config.results}
    if (before := read_settings(settings)) is not None and (changes := list(describe_changes(before, wanted))):
        raise UserError(
            f"{options.output}: holds runs of another command ({'; '.join(changes)}); choose another --output, or "
            "remove it"
        )
    write_json(settings, wanted)
    points: list[Point] = []
    for seed in config.seeds:
        points += _run_seed(config, options.output / f"seed_{seed}", seed)
    summaries = summarize(points)
    report = options.output / "report"
    content = {
        "points": list(map(dataclasses.asdict, points)),
        "summaries": list(map(dataclasses.asdict, summaries)),
    }
    write_json(report / "results.json", content)
    write_report(report, summaries, config.title, config.chance)
    return points


def _run_seed(config: StudyConfig, output: Path, seed: int) -> list[Point]:
    results = output / config.results
    if not results.exists():
        words = [word.replace("{seed}", str(seed)).replace("{output}", str(output)) for word in config.command]
        logger.info(f"$ python {' '.join(words)}")
        if code := subprocess.run([sys.executable, *words]).returncode:
            raise UserError(f"the run with seed {seed} ended with exit code {code}; see above")
    return read_points(results)
