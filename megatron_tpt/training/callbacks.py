"""What happens beside the training loop, each a class."""

import gc

from megatron_tpt import platform
from megatron_tpt.training.bad_steps import CheckNumbers
from megatron_tpt.training.checkpoint import SaveError
from megatron_tpt.training.checkpoint_files import delete_old_checkpoints
from megatron_tpt.training.profiling import Profile
from megatron_tpt.training.reporting import ReportMetrics
from megatron_tpt.training.stopping import StopEarly
from megatron_tpt.training.trainer import Callback, StepReport, Trainer


class Validate(Callback):
    """Every training.validation_interval steps and at the end: the losses on data.validation."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        interval = trainer.recipe.training.validation_interval
        is_last = trainer.step == trainer.recipe.training.num_steps
        if not interval or not trainer.data.validation or (trainer.step % interval and not is_last):
            return
        metrics = {f"validation_{name}": value for name, value in trainer.validate().items()}
        trainer.metrics.write(trainer.step, metrics)
        if platform.is_first_rank():
            print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)


class SaveCheckpoints(Callback):
    """Every checkpoint.save_interval steps, and when training is over. One that cannot be written is tried again at the
    next interval; only the last has to be."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        settings = trainer.recipe.checkpoint
        if not trainer.is_over and (not settings.save_interval or trainer.step % settings.save_interval):
            return
        try:
            trainer.save()
        except SaveError as error:
            if trainer.is_over:
                raise
            if platform.is_first_rank():
                print(f"WARNING: {error}; training goes on, the next try is at the next interval", flush=True)
            return
        if settings.keep_last is not None and platform.is_first_rank():
            delete_old_checkpoints(trainer.checkpoints, settings.keep_last, settings.keep_every)


class TightenTimeout(Callback):
    """After the first step of this start, collectives wait for run.distributed_timeout_s, no longer for the time that
    starting may take."""

    def before_training(self, trainer: Trainer) -> None:
        self.is_first_step = True

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if self.is_first_step:
            platform.set_timeout(trainer.recipe.run.distributed_timeout_s)
        self.is_first_step = False


class CollectGarbage(Callback):
    """Collects Python's garbage at the same steps on all ranks: one that stops to collect makes all others wait."""

    def before_training(self, trainer: Trainer) -> None:
        if trainer.recipe.training.manual_gc_interval:
            gc.disable()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        interval = trainer.recipe.training.manual_gc_interval
        if interval and trainer.step % interval == 0:
            gc.collect()

    def after_training(self, trainer: Trainer) -> None:
        gc.enable()


def default_callbacks() -> list[Callback]:
    """Those of the training programs, in the order in which they act after a step."""
    return [
        StopEarly(),
        CheckNumbers(),
        Profile(),
        ReportMetrics(),
        Validate(),
        SaveCheckpoints(),
        TightenTimeout(),
        CollectGarbage(),
    ]
