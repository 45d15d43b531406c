"""REPRO in miniature: does rewarding the process shorten thinking, and does it keep the answers right?

python examples/repro_demo/repro_arms.py --output runs/repro-demo     (`make repro-demo`)

The study of study.yaml with fewer arms and one seed, which was used to choose its settings. Every step is a command
line of this project; a step that has run is not repeated. The report is in OUTPUT/claims.
"""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.fields import PositiveInt
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.studies.options import StudyOptions
from megatron_tpt.studies.run import run_study

STUDY = Path(__file__).resolve().parent / "study.yaml"


@dataclass(frozen=True)
class DemoOptions:
    """Which part of the study to run, and where."""

    output: Path = Path("runs/repro-demo")
    """A folder for the steps and the report."""
    arms: list[str] = field(default_factory=lambda: ["GRPO", "REPRO"])
    """Arms of study.yaml, beside the policy that they start from."""
    seed: int = 0
    """Decides the parcels, the policy to start from, the order and the sampling."""
    num_workers: PositiveInt = 2
    """Steps that run at once, each with one thread."""


def part_of_study(options: DemoOptions) -> str:
    """The study with these arms and this seed, as YAML. Raises UserError for an arm that there is not."""
    content = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    known = content["factors"]["arm"]
    for arm in options.arms:
        if arm not in known:
            raise UserError(f"--arms {arm}: there is none of this name; there are {', '.join(known)}")
    content["factors"] = {
        "arm": {arm: known[arm] for arm in dict.fromkeys(("start", *options.arms))},
        "seed": [options.seed],
    }
    content["exclude"] = []
    return yaml.safe_dump(content, sort_keys=False)


def run_demo(options: DemoOptions) -> None:
    """Run what is missing of this part of the study."""
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "demo.yaml"
    with atomic_write(path) as temporary:
        temporary.write_text(part_of_study(options), encoding="utf-8")
    run_study(StudyOptions(path, options.output, scale=ScaleOptions(num_workers=options.num_workers)))


if __name__ == "__main__":
    run(lambda: run_demo(parse(DemoOptions, description=__doc__)))
