"""The training loop. Everything around it is done by callbacks (callbacks.py); builder.py builds a trainer.

    build_trainer(recipe, data, callbacks).fit()

on batches of its data, or of another source (rl/loop.py); or, from another loop, one optimizer step at a time:

    with trainer.running():
        for batch in trainer.batches():  # or your own batches
            trainer.step(batch)
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_tpt import platform
from megatron_tpt.config.load import to_yaml
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.errors import StoppedEarly, UserError
from megatron_tpt.objectives.objective import Objective
from megatron_tpt.training.batches import Batch, take_batch
from megatron_tpt.training.checkpoint_files import newest_whole_checkpoint, step_folder
from megatron_tpt.training.checkpoint_loading import load_checkpoint, read_trainer_state
from megatron_tpt.training.checkpoint_saving import CheckpointSaving, start_saving
from megatron_tpt.training.checkpoint_state import random_state, set_random_state
from megatron_tpt.training.data import TrainingData, ValidationLoader
from megatron_tpt.training.model import TrainedModel
from megatron_tpt.training.phases import phase
from megatron_tpt.training.resume import require_tokenizer, resume_warnings
from megatron_tpt.training.steps import reduce_sums

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class StepReport:
    """Measurements of one optimizer step on this rank."""

    sums: torch.Tensor
    """This rank's sums of the objective, fp64 [num_sums], in the order of its `sum_names`; 0 when the step was skipped.
    """
    grad_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    """Rate of this update."""
    num_tokens: int
    """Tokens of the global batch; 0 when the step was skipped."""
    seconds: float
    """Wall time of the step, data included."""
    data_wait_s: float
    """Part of it spent waiting for data."""
    own_work_s: float
    """Part of it until this rank's gradients were computed (local work, see stragglers.py), data_wait_s included."""


class RollBack(Exception):
    """Raised by a callback on all ranks: roll back to the last checkpoint."""


class BadStep(UserError):
    """Raised by a callback on all ranks: training must not continue."""


class Callback:
    """Hooks around the training loop. All ranks call every method, in the order of the callbacks.

    A roll-back ends training and starts it again: `after_training`, `load_state`, `before_training`.
    """

    def before_training(self, trainer: "Trainer") -> None:
        """The model is built, and the last checkpoint, if any, is loaded."""

    def before_update(self, trainer: "Trainer", sums: torch.Tensor) -> bool:
        """The gradients of the step after `trainer.global_step` are computed; `sums` are this rank's, as in StepReport.
        Return False to skip the update; all ranks must return the same."""
        return True

    def after_step(self, trainer: "Trainer", report: StepReport) -> None:
        """`trainer.global_step` optimizer steps are done."""

    def after_training(self, trainer: "Trainer") -> None:
        """All steps are done, or all ranks stop together."""

    def after_failure(self, trainer: "Trainer") -> None:
        """Training ends with an exception, perhaps on this rank alone: do not wait for other ranks."""

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint: plain values, the same on every rank."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, before `before_training`."""


class Trainer:
    """Trains a model on batches, with callbacks around every step. Needs process groups.

    `global_step` is the number of optimizer steps done; `tokens` is the number of tokens in their batches, including
    skipped ones.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: TrainedModel,
        objective: Objective,
        data: TrainingData,
        callbacks: Sequence[Callback],
        *,
        model_files: Mapping[str, bytes],
    ) -> None:
        """`model_files` are the contents of files for every checkpoint, by name."""
        self.recipe = recipe
        self.model = model
        self.objective = objective
        self.data = data
        self.callbacks = list(callbacks)
        self.model_files = model_files
        self.checkpoints: Path = recipe.run.output_dir / "checkpoints"
        self.metrics: Any = None  # the MetricsWriter, set by ReportMetrics
        self.global_step = 0
        self.tokens = 0
        self.excluded_steps: set[int] = set()  # to skip, in addition to training.skip_steps; numbered from 1
        self.stop_reason: str | None = None  # set it on all ranks to stop after this step
        self.stop_is_final = False  # with a reason: the same command shall not resume by itself
        self.save_requested = False  # set it on all ranks to save a checkpoint after this step
        self._batches: Generator[Batch] | None = None

    def fit(self, source: Callable[[], Iterator[Batch]] | None = None) -> None:
        """Train until `training.num_steps`, on the batches from `source`, in place of those of the data: called at the
        start and after a roll-back, it begins with the batch of the next step. Raises StoppedEarly if a callback has
        set `stop_reason` before, UserError if it has set `stop_is_final`, too."""
        source = source or self.batches
        with self.running():
            batches = source()
            while not self.is_over:
                try:
                    self.step(next(batches))
                except RollBack:
                    self.roll_back()
                    batches = source()
        if self.global_step < self.recipe.training.num_steps:
            stopped = f"stopped after step {self.global_step} ({self.stop_reason})"
            if self.stop_is_final:
                raise UserError(stopped)
            raise StoppedEarly(f"{stopped}: the same command resumes")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the callbacks before and after a `with` block of steps, or those for a failure."""
        try:
            self._begin()
            try:
                yield
            except BadStep:
                self._end()
                raise
            self._end()
        except BaseException:
            for callback in self.callbacks:
                callback.after_failure(self)
            raise
        finally:
            self._close_batches()

    @property
    def is_over(self) -> bool:
        """Whether training ends here: all steps are done, or there is a reason to stop."""
        return self.global_step == self.recipe.training.num_steps or self.stop_reason is not None

    def _begin(self) -> None:
        for callback in self.callbacks:
            callback.before_training(self)

    def _end(self) -> None:
        for callback in self.callbacks:
            callback.after_training(self)

    def batches(self) -> Iterator[Batch]:
        """The batches from the next step to the last; those of steps to skip have no micro-batches. The iterator and
        its data-loading processes end with `running`, and when this is called again."""
        self._close_batches()
        self._batches = self._iterate()
        return self._batches

    def _close_batches(self) -> None:
        if self._batches is not None:
            self._batches.close()

    def _iterate(self) -> Generator[Batch]:
        first, end = self.global_step, self.recipe.training.num_steps
        skipped = frozenset(self.excluded_steps)
        with contextlib.closing(self.data.train.iterate(first, end, skipped)) as microbatches:
            for step in range(first, end):
                if self.skips(step + 1):
                    yield Batch([], [], self.recipe.training.batch_size(step) * self.recipe.training.sequence_length)
                else:
                    yield take_batch(self.data.train, microbatches, step, self.recipe.run.seed, self.recipe.model)

    def skips(self, step: int) -> bool:
        """Whether the data of `step` (numbered from 1) is skipped, by the recipe or after a roll-back."""
        return step in self.excluded_steps or self.recipe.training.skips(step)

    def step(self, batch: Batch) -> StepReport:
        """Do one optimizer step and call `after_step` of the callbacks. All ranks call it. Raises BadStep or RollBack;
        after a RollBack, call `roll_back` and get new `batches`."""
        report = self._update(batch)
        for callback in self.callbacks:
            callback.after_step(self, report)
        return report

    def roll_back(self) -> None:
        """End training, and start it again from the last checkpoint."""
        self._end()
        newest = newest_whole_checkpoint(self.checkpoints, reads_content=self.recipe.checkpoint.verify)
        if newest is None:
            raise UserError(
                f"there is no checkpoint in {self.checkpoints} to roll back to: give checkpoint.save_interval"
            )
        self.resume(newest)
        self._begin()

    @phase("update")
    def _update(self, batch: Batch) -> StepReport:
        begin, learning_rate = time.perf_counter(), self.model.learning_rate
        self.model.own_work.start()
        if not len(batch):
            return self._skip(batch, begin)
        self._batch, self._random_before = batch, random_state()
        sums = self.model.forward_backward(batch, self.objective)
        if not all([callback.before_update(self, sums) for callback in self.callbacks]):
            return self._skip(batch, begin)
        grad_norm = self.model.update()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient norm is {grad_norm} at step {self.global_step + 1} (learning rate {learning_rate:g}); "
                f"checkpoints of earlier steps are in {self.checkpoints}"
            )
        self._advance(batch)
        seconds, own_work_s = time.perf_counter() - begin, self.model.own_work.seconds
        return StepReport(sums, grad_norm, learning_rate, batch.num_tokens, seconds, batch.waited_s, own_work_s)

    def run_again(self) -> torch.Tensor:
        """Recompute the current batch with the same random numbers, for use in `before_update`. Returns the sums; the
        gradients are replaced. All ranks call it."""
        set_random_state(self._random_before)
        return self.model.forward_backward(self._batch, self.objective)

    def _skip(self, batch: Batch, begin: float) -> StepReport:
        """Count the step that began at `begin`, without an update."""
        learning_rate = self.model.learning_rate
        self._advance(batch)
        sums = torch.zeros(len(self.objective.sum_names), dtype=torch.float64, device=platform.device())
        return StepReport(sums, 0.0, learning_rate, 0, time.perf_counter() - begin, 0.0, 0.0)

    def _advance(self, batch: Batch) -> None:
        self.model.schedule.step(1)
        self.global_step += 1
        self.tokens += batch.num_tokens

    def named_sums(self, sums: torch.Tensor) -> dict[str, float]:
        """This rank's sums [num_sums] -> the sums over all ranks by name. All ranks call it."""
        return dict(zip(self.objective.sum_names, reduce_sums(sums).tolist(), strict=True))

    @phase("validation")
    def validate(self) -> dict[str, float]:
        """The objective's metrics over the validation batches, the same ones every time: over all sets together and, if
        there are several, the loss of each. All ranks call it."""
        if not self.data.validation:
            raise UserError("there is no validation data: give data.validation")
        sums = {name: self._validation_sums(loader) for name, loader in self.data.validation.items()}
        total = {name: sum(one[name] for one in sums.values()) for name in self.objective.sum_names}
        losses = {f"loss/{name}": one["loss"] / one["tokens"] for name, one in sums.items() if one["tokens"]}
        return self.objective.metrics(total) | (losses if len(sums) > 1 else {})

    def _validation_sums(self, loader: ValidationLoader) -> dict[str, float]:
        with contextlib.closing(loader.iterate(0, loader.num_steps)) as microbatches:
            batches = (
                take_batch(loader, microbatches, step, self.recipe.run.seed, self.recipe.model, training=False)
                for step in range(loader.num_steps)
            )
            parts = [self.model.evaluate(batch, self.objective) for batch in batches]
        return self.named_sums(torch.stack(parts).sum(dim=0))

    def start_saving(self) -> CheckpointSaving:
        """Prepare a checkpoint of the current step. All ranks call it. Raises SaveError on all of them."""
        self.model.gather_weights()
        states = {type(callback).__name__: callback.state() for callback in self.callbacks}
        num_samples = self.recipe.training.num_samples(self.global_step)
        return start_saving(
            step_folder(self.checkpoints, self.global_step),
            self.model.gpts,
            self.model.optimizer,
            {"step": self.global_step, "tokens": self.tokens, "samples": num_samples, "callbacks": states}
            | {"data": self.data.identity(num_samples), "learning_rate": self.model.learning_rate}
            | self._source_tokens(num_samples),
            recipe_yaml=to_yaml(self.recipe),
            model_files=self.model_files,
            optimizer_sharding=self.recipe.checkpoint.optimizer_sharding,
        )

    def _source_tokens(self, num_samples: int) -> dict[str, Any]:
        """For a checkpoint: the tokens consumed from each source."""
        taken = self.data.source_tokens
        return {"source_tokens": taken.after(num_samples)} if taken else {}

    def resume(self, folder: Path) -> None:
        """Load a checkpoint of this run: weights, optimizer, random state, and the state of callbacks. All ranks call
        it. Raises UserError for one of another run."""
        require_tokenizer(folder, self.data.tokenizer_fingerprint)
        warn(resume_warnings(self.recipe, folder, read_trainer_state(folder), self.data.identity))
        state = load_checkpoint(folder, self.model.gpts, self.model.optimizer)
        self.global_step, self.tokens = state["step"], state["tokens"]
        self.model.schedule.num_steps = 0
        self.model.schedule.step(self.global_step)
        for callback in self.callbacks:
            if callback_state := state["callbacks"].get(type(callback).__name__):
                callback.load_state(callback_state)
        logger.info(f"resumed from {folder} at step {self.global_step}")


def warn(warnings: Iterable[str]) -> None:
    """Log warnings, after all ranks have generated all of them."""
    for warning in list(warnings):
        logger.warning(warning)
