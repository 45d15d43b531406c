"""The options of `tools/study.py`. Light to import: the help of the command line needs nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_tpt.config.fields import POSITIONAL


@dataclass(frozen=True)
class StudyOptions:
    """Which study to run, and where to."""

    study: Annotated[Path, POSITIONAL]
    """The study's YAML file: title, command, seeds, results."""
    output: Path = Path("runs/study")
    """A folder for the runs, seed_0/ and so on, and the report/. Finished runs are not repeated."""
