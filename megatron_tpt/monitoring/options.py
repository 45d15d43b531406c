"""The options of tools/status.py. Light to import: the help of a command line needs nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_tpt.config.fields import POSITIONAL, PositiveFloat


@dataclass(frozen=True)
class StatusOptions:
    """Which runs and jobs to show, and how."""

    folders: Annotated[list[Path], POSITIONAL]
    """Folders of training runs and of jobs (run.output_dir, --output), or folders of such folders."""
    watch: bool = False
    """Show them again and again, until Ctrl-C."""
    interval_s: PositiveFloat = 5.0
    """Seconds between two looks of --watch."""
    json: bool = False
    """Print a JSON list instead of a page; with --watch one on a line at every look."""
