"""The options of tools/report.py. Light to import: the help of a command line needs nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron_tpt.config.fields import POSITIONAL, NonNegativeInt


@dataclass(frozen=True)
class ReportOptions:
    """Which runs to report on, and where to write the page."""

    folders: Annotated[list[Path], POSITIONAL]
    """Folders of training runs (run.output_dir), or folders of such folders; several are shown side by side."""
    output: Path = Path("report.html")
    """The page: one file that any browser opens, without a server, a network or a script."""
    x: Literal["steps", "tokens"] = "steps"
    """What curves are drawn against; tokens compare runs of different batch sizes."""
    samples: NonNegativeInt = 4
    """Samples of the training data to show for each run; they go into the page as they are."""
