"""The callbacks of the training loop, and their default list."""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator

from megatron_tpt import platform
from megatron_tpt.training.bad_steps import CheckNumbers
from megatron_tpt.training.checkpoint_files import delete_old_checkpoints
from megatron_tpt.training.checkpoint_saving import CheckpointSaving, SaveError
from megatron_tpt.training.desync import CheckCopies
from megatron_tpt.training.profiling import Profile
from megatron_tpt.training.reporting import ReportMetrics
from megatron_tpt.training.stopping import StopEarly
from megatron_tpt.training.trainer import Callback, StepReport, Trainer
from megatron_tpt.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Validate(Callback):
    """Every training.validation_interval steps and at the end: the losses on data.validation."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        interval = trainer.recipe.training.validation_interval
        is_last = trainer.global_step == trainer.recipe.training.num_steps
        if not interval or not trainer.data.validation or (trainer.global_step % interval and not is_last):
            return
        metrics = {f"validation_{name}": value for name, value in trainer.validate().items()}
        if metrics:
            trainer.metrics.write(trainer.global_step, metrics)
        losses = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if "_loss" in name)
        logger.info(losses or "validation: no token to learn from")


class SaveCheckpoints(Callback):
    """Every checkpoint.save_interval steps, when it is asked for, and at the end of training. A failed save is retried
    at the next interval; only a failure of the last one ends the run.

    With checkpoint.asynchronous one checkpoint at a time is written during training; the next one waits for it.
    """

    def __init__(self) -> None:
        self.pending: CheckpointSaving | None = None
        self.save_before: Callable[[], None] = lambda: None
        """Saves what a run needs beside its checkpoint to resume from it. Raises SaveError on all ranks."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        interval = trainer.recipe.checkpoint.save_interval
        is_due = trainer.is_over or trainer.save_requested or (interval > 0 and trainer.global_step % interval == 0)
        trainer.save_requested = False
        if self.pending is not None:
            is_written = self.pending.is_written()
            if is_due and not is_written:
                logger.warning(f"training waits until {self.pending.folder.name} is written")
            if is_due or is_written:
                self._finish_pending(trainer)
        if is_due:
            self._save(trainer)

    def after_training(self, trainer: Trainer) -> None:
        if self.pending is not None:
            self._finish_pending(trainer)

    def after_failure(self, trainer: Trainer) -> None:
        if self.pending is not None:
            self.pending.abandon()

    def _finish_pending(self, trainer: Trainer) -> None:
        assert self.pending is not None
        with _save_errors_warned(), patient(trainer):
            self._finish(trainer, self.pending)
        self.pending = None

    def _save(self, trainer: Trainer) -> None:
        with contextlib.nullcontext() if trainer.is_over else _save_errors_warned(), patient(trainer):
            self.save_before()
            saving = trainer.start_saving()
            if trainer.recipe.checkpoint.asynchronous and not trainer.is_over:
                saving.write_in_background()
                self.pending = saving
            else:
                self._finish(trainer, saving)

    def _finish(self, trainer: Trainer, saving: CheckpointSaving) -> None:
        settings = trainer.recipe.checkpoint
        saving.finish()
        if settings.keep_last is not None and platform.is_first_rank():
            delete_old_checkpoints(trainer.checkpoints, settings.keep_last, settings.keep_every)


@contextlib.contextmanager
def _save_errors_warned() -> Iterator[None]:
    """Turn a SaveError into a warning."""
    try:
        yield
    except SaveError as error:
        logger.warning(f"{error}; training continues, and the next save_interval retries")


@contextlib.contextmanager
def patient(trainer: Trainer) -> Iterator[None]:
    """Raise the timeout of collectives while saving or sampling: ranks with little to do wait for the other ranks."""
    run = trainer.recipe.run
    platform.set_timeout(run.first_step_timeout_s)
    try:
        yield
    except SaveError:  # raised on all ranks, and training may continue; other errors end the run
        platform.set_timeout(run.distributed_timeout_s)
        raise
    platform.set_timeout(run.distributed_timeout_s)


class TightenTimeout(Callback):
    """After the first step since the start, lowers the timeout of collectives from run.first_step_timeout_s to
    run.distributed_timeout_s."""

    def before_training(self, trainer: Trainer) -> None:
        self.is_first_step = True

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if self.is_first_step:
            platform.set_timeout(trainer.recipe.run.distributed_timeout_s)
        self.is_first_step = False

    def after_training(self, trainer: Trainer) -> None:
        platform.set_timeout(trainer.recipe.run.first_step_timeout_s)  # a roll-back begins with loading


class CollectGarbage(Callback):
    """Collects Python's garbage at the same steps on all ranks: a rank that pauses to collect delays all others."""

    def before_training(self, trainer: Trainer) -> None:
        if trainer.recipe.training.manual_gc_interval:
            gc.disable()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        interval = trainer.recipe.training.manual_gc_interval
        if interval and trainer.global_step % interval == 0:
            gc.collect()

    def after_training(self, trainer: Trainer) -> None:
        gc.enable()


def default_callbacks() -> list[Callback]:
    """The callbacks of the training programs, in the order in which they act after a step."""
    return [
        Watchdog(),
        StopEarly(),
        CheckNumbers(),
        CheckCopies(),
        Profile(),
        ReportMetrics(),
        Validate(),
        SaveCheckpoints(),
        TightenTimeout(),
        CollectGarbage(),
    ]
