"""Requests to a run by files in its folder, as anyone makes them who may write there. Imports no torch.

touch RUN/save    a checkpoint after the current step; the run removes the file
touch RUN/stop    the run stops after the current step, with a checkpoint and code 2, and does not start again while
                  the file is there: whatever would queue or start it again (slurm/train.sbatch) ends, too
"""

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

from megatron_tpt.errors import UserError

SAVE, STOP = "save", "stop"
_LOOK_EVERY_S = 1.0
"""A shared file system need not be asked after every step."""


class Asked(NamedTuple):
    """What is asked of a run."""

    stop: bool = False
    save: bool = False


class Requests:
    """Looks for requests in a run folder. One process of the run has one."""

    def __init__(self, folder: Path) -> None:
        self._stop, self._save = folder / STOP, folder / SAVE
        self._next_look_s = 0.0
        self._saved_ns: int | None = None

    def look(self) -> Asked:
        """What is asked now, but at most once a second. A request to save is taken: it is reported once."""
        if time.monotonic() < self._next_look_s:
            return Asked()
        self._next_look_s = time.monotonic() + _LOOK_EVERY_S
        return Asked(self._stop.exists(), self._take_save())

    def _take_save(self) -> bool:
        try:
            made_ns = self._save.stat().st_mtime_ns
        except OSError:
            return False
        is_new = made_ns != self._saved_ns  # one that cannot be removed is not obeyed again and again
        self._saved_ns = made_ns
        with contextlib.suppress(OSError):
            self._save.unlink()
        return is_new


def require_no_stop(folder: Path) -> None:
    """Raise UserError while a run is asked to stop: it must not start."""
    if (folder / STOP).exists():
        raise UserError(f"{folder / STOP} asks this run to stop: remove it (rm {folder / STOP}) to train on")
