"""The options of `tools/study.py`. Light to import: the help of the command line needs nothing else."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_tpt.config.fields import FLAT, POSITIONAL
from megatron_tpt.errors import UserError
from megatron_tpt.jobs.options import ScaleOptions


@dataclass(frozen=True)
class StudyOptions:
    """Which study to run, and where to."""

    study: Annotated[Path, POSITIONAL]
    """The study's YAML file."""
    output: Path = Path("runs/study")
    """A folder for the steps, STEP/LEVELS-KEY-CODE/, and the report/. Finished steps are not repeated."""
    dry_run: bool = False
    """Print the steps, what each would cost and what depends on what; start nothing."""
    status: bool = False
    """Print the state of every step, and where the logs of failed ones are."""
    report: bool = False
    """Write the report of the last run again from the folders of its steps; start nothing."""
    code: Literal["ask", "keep", "rerun"] = "ask"
    """Where only the code of steps that have run or begun has changed since: refuse and name the files; keep what was
    run, and resume what has begun; or run it again."""
    scale: Annotated[ScaleOptions, FLAT] = field(default_factory=ScaleOptions)

    def __post_init__(self) -> None:
        if self.dry_run + self.status + self.report > 1:
            raise UserError("--dry-run, --status and --report: give one of them")
        if self.scale.num_tasks != 1:
            raise UserError("--num-tasks: a step is one task; --num-workers says how many steps run at once")
