"""A callback for runs in which something happens at a certain step."""

import time
from pathlib import Path

from megatron_tpt.training.trainer import Callback, StepReport, Trainer


class Hold(Callback):
    """After each of these steps, waits until FOLDER/go-STEP is there. The step is reported by then."""

    def __init__(self, steps: list[int], folder: Path) -> None:
        self.steps, self.folder = steps, folder

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        while trainer.global_step in self.steps and not (self.folder / f"go-{trainer.global_step}").exists():
            time.sleep(0.1)
