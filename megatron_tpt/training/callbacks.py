"""What happens beside the training loop, each a class."""

import gc
import json
from typing import Any

import torch

from megatron_tpt import platform
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.files import atomic_write
from megatron_tpt.training.checkpoint import SaveError
from megatron_tpt.training.checkpoint_files import delete_old_checkpoints
from megatron_tpt.training.metrics import model_flops_per_token, throughput
from megatron_tpt.training.steps import reduce_sums
from megatron_tpt.training.trainer import Callback, StepReport, Trainer


class MetricsWriter:
    """Writes metrics to the console, `metrics.jsonl` and TensorBoard. Only the first rank writes.

    After a resume, lines of steps beyond the checkpoint are removed: those steps are done again.
    """

    def __init__(self, recipe: Recipe, resumed_step: int) -> None:
        self.enabled = platform.is_first_rank()
        if not self.enabled:
            return
        path = recipe.run.output_dir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _is_until(line, resumed_step)]
            with atomic_write(path) as temporary:
                temporary.write_text("".join(kept))
        self.file = path.open("a")
        self.tensorboard: Any = None
        if recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(recipe.run.output_dir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""
        if not self.enabled:
            return
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        if self.tensorboard is not None:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()

    def close(self) -> None:
        """Close the files."""
        if self.enabled:
            self.file.close()
            if self.tensorboard is not None:
                self.tensorboard.close()


def _is_until(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except ValueError:  # the line that a killed run was writing
        return False


class ReportMetrics(Callback):
    """Every logging.log_interval steps: losses by kind, learning rate, gradient norm, speed."""

    def before_training(self, trainer: Trainer) -> None:
        recipe = trainer.recipe
        trainer.metrics = MetricsWriter(recipe, trainer.step)
        self.flops_per_token = model_flops_per_token(recipe.model, recipe.training.sequence_length)
        self._reset()

    def _reset(self) -> None:
        self.loss_sums = torch.zeros(4, dtype=torch.float64, device=platform.device())
        self.num_steps, self.num_tokens, self.seconds, self.data_wait_s = 0, 0, 0.0, 0.0

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self.loss_sums += report.loss_sums
        self.num_steps += 1
        self.num_tokens += report.num_tokens
        self.seconds += report.seconds
        self.data_wait_s += report.data_wait_s
        if trainer.step % trainer.recipe.logging.log_interval == 0 or trainer.step == trainer.recipe.training.num_steps:
            self._report(trainer, report)
            self._reset()

    def _report(self, trainer: Trainer, report: StepReport) -> None:
        metrics = reduce_sums(self.loss_sums).means(trainer.data.unmarked_name)
        metrics |= {"tokens": trainer.tokens, "learning_rate": report.learning_rate, "grad_norm": report.grad_norm}
        metrics |= {"step_s": self.seconds / self.num_steps}
        metrics |= throughput(
            self.num_tokens,
            self.seconds,
            self.data_wait_s,
            flops_per_token=self.flops_per_token,
            num_devices=torch.distributed.get_world_size(),
            peak_tflops=trainer.recipe.logging.peak_tflops,
        )
        trainer.metrics.write(trainer.step, metrics)
        if platform.is_first_rank():
            losses = "  ".join(f"{name} {metrics[name]:.4f}" for name in metrics if name.startswith("loss"))
            print(
                f"step {trainer.step:>7}/{trainer.recipe.training.num_steps}  {losses}  lr {report.learning_rate:.3e}  "
                f"grad norm {report.grad_norm:.3f}  {metrics['tokens_per_s']:,.0f} tokens/s  "
                f"{metrics['tflops_per_device']:.3g} TFLOP/s/device  data wait {metrics['data_wait_fraction']:.1%}",
                flush=True,
            )

    def after_training(self, trainer: Trainer) -> None:
        trainer.metrics.close()


class Validate(Callback):
    """Every training.validation_interval steps and at the end: the losses on data.validation."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        interval = trainer.recipe.training.validation_interval
        is_last = trainer.step == trainer.recipe.training.num_steps
        if not interval or trainer.data.validation is None or (trainer.step % interval and not is_last):
            return
        metrics = {f"validation_{name}": value for name, value in trainer.validate().items()}
        trainer.metrics.write(trainer.step, metrics)
        if platform.is_first_rank():
            print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)


class SaveCheckpoints(Callback):
    """Every checkpoint.save_interval steps, and after the last. One that cannot be written is tried again at the next
    interval; only the last has to be."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        settings = trainer.recipe.checkpoint
        is_last = trainer.step == trainer.recipe.training.num_steps
        if not is_last and (not settings.save_interval or trainer.step % settings.save_interval):
            return
        try:
            trainer.save()
        except SaveError as error:
            if is_last:
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
    return [ReportMetrics(), Validate(), SaveCheckpoints(), TightenTimeout(), CollectGarbage()]
