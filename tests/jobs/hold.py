"""A callback for runs in which something happens at a certain step."""

import time
from pathlib import Path

from megatron_tpt.training.stopping import StopEarly
from megatron_tpt.training.trainer import Callback, StepReport, Trainer


class Hold(Callback):
    """After each of these steps, which are reported by then, waits until FOLDER/go-STEP is there, or until this process
    is signalled to stop."""

    def __init__(self, steps: list[int], folder: Path) -> None:
        self.steps, self.folder = steps, folder

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        [stopping] = [one for one in trainer.callbacks if isinstance(one, StopEarly)]
        go = self.folder / f"go-{trainer.global_step}"
        while trainer.global_step in self.steps and not go.exists() and not stopping.reason:
            time.sleep(0.1)
