"""Clean early stops: on a signal, before a time limit or by request, with a checkpoint at the end of the step.

SIGTERM and SIGUSR1 to any rank stop all of them, and so does a time limit (run.time_limit_min, or that of the SLURM
job). The program then exits with code 75 (EX_TEMPFAIL of sysexits.h: try again later), which scripts can distinguish
from a fault (1) and a mistake (2); the same command resumes. torchrun turns every code but 0 into 1; if the code
matters, start the ranks with srun, which passes the code on.

The file RUN/stop (requests.py, which also has RUN/save) stops them, too, but with code 2: nothing shall start the run
again before someone removes the file.
"""

import logging
import os
import signal
import time
from types import FrameType

import torch

from megatron_tpt import platform
from megatron_tpt.platform.signals import STOP_SIGNALS
from megatron_tpt.training.requests import STOP, Asked, Requests
from megatron_tpt.training.trainer import Callback, StepReport, Trainer

logger = logging.getLogger(__name__)

_SLURM_END_TIME = "SLURM_JOB_END_TIME"  # seconds since 1970
_NO_REASON, _TIME_LIMIT, _REQUEST = 0, 1000, 1001  # a signal's number lies between the first two


def stopping_time(limit_min: float | None, margin_min: float, now: float) -> float | None:
    """When to stop, in seconds since 1970: `margin_min` before the limit, but not before nine tenths of the remaining
    time. The limit is `limit_min` from now, or else the end of the SLURM job; None without either."""
    end = now + 60 * limit_min if limit_min is not None else float(os.environ.get(_SLURM_END_TIME, "inf"))
    return end - min(60 * margin_min, (end - now) / 10) if end != float("inf") else None


class StopEarly(Callback):
    """Stops all ranks with a checkpoint after a step in which any received a signal, near the time limit, or when the
    file RUN/stop is there; on RUN/save it asks for a checkpoint alone."""

    def before_training(self, trainer: Trainer) -> None:
        run = trainer.recipe.run
        self.reason = _NO_REASON
        self.requests = Requests(run.output_dir)
        now = time.time()
        end = stopping_time(run.time_limit_min, run.time_limit_margin_min, now)
        # From here on the monotonic clock is used.
        self.deadline = time.monotonic() + end - now if end is not None else None
        self.handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = number

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if self.reason == _NO_REASON and self.deadline is not None and time.monotonic() >= self.deadline:
            self.reason = _TIME_LIMIT
        asked = self.requests.look() if platform.is_first_rank() else Asked()
        if self.reason == _NO_REASON and asked.stop:
            self.reason = _REQUEST
        votes = torch.tensor([self.reason, int(asked.save)], device=platform.device())
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
        number, saves = votes.tolist()
        if number != _NO_REASON:
            trainer.stop_reason = self._describe(trainer, number)
            trainer.stop_is_final = number == _REQUEST
        if saves:
            logger.info(f"a checkpoint was asked for after step {trainer.global_step}")
            trainer.save_requested = True

    def _describe(self, trainer: Trainer, number: int) -> str:
        if number == _REQUEST:
            return f"{trainer.recipe.run.output_dir / STOP} is there: remove it to train on"
        return "the time limit is near" if number == _TIME_LIMIT else signal.Signals(number).name

    def after_training(self, trainer: Trainer) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
