"""The training loop: a table of contents. What happens beside it is in callbacks.py."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_tpt import platform
from megatron_tpt.config.load import to_yaml
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.errors import StoppedEarly, UserError
from megatron_tpt.files import atomic_write
from megatron_tpt.models.gpt import build_chunks, describe_kernels
from megatron_tpt.training.checkpoint_files import newest_whole_checkpoint, step_folder
from megatron_tpt.training.checkpoint_loading import load_checkpoint, load_weights, read_trainer_state
from megatron_tpt.training.checkpoint_saving import CheckpointSaving, start_saving
from megatron_tpt.training.checkpoint_state import random_state, set_random_state
from megatron_tpt.training.data import Loader, TrainingData
from megatron_tpt.training.metrics import LossSums
from megatron_tpt.training.model_files import model_files
from megatron_tpt.training.new_tokens import start_new_tokens
from megatron_tpt.training.optimizer import build_optimizer, build_schedule, current_learning_rate, wrap_model
from megatron_tpt.training.resume import require_tokenizer, resume_warnings, start_warnings
from megatron_tpt.training.steps import Batch, TimedIterator, attention_is_packed, reduce_sums, run_microbatches
from megatron_tpt.training.stragglers import OwnWork

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import get_model_config


@dataclasses.dataclass
class StepReport:
    """What one optimizer step measured on this rank."""

    loss_sums: torch.Tensor
    """This rank's document loss, document tokens, thinking loss, thinking tokens by source: [num_sources, 4]."""
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
    """Part of it until this rank's own gradients were there (see stragglers.py), data_wait_s included."""


class RollBack(Exception):
    """Raised by a callback on all ranks: go back to the last checkpoint."""


class BadStep(UserError):
    """Raised by a callback on all ranks: training must not go on."""


class Callback:
    """Something that happens beside the training loop. All ranks call every method, in the order of the callbacks.

    A roll-back ends training and begins it again: `after_training`, `load_state`, `before_training`.
    """

    def before_training(self, trainer: "Trainer") -> None:
        """The model is built, and the last checkpoint, if any, is loaded."""

    def before_update(self, trainer: "Trainer", loss_sums: torch.Tensor) -> bool:
        """The gradients of the step after `trainer.step` are there, and this rank's losses as StepReport has them. An
        answer of False leaves the update out; it must be the same on all ranks."""
        return True

    def after_step(self, trainer: "Trainer", report: StepReport) -> None:
        """`trainer.step` optimizer steps are done."""

    def after_training(self, trainer: "Trainer") -> None:
        """All steps are done, or all ranks stop together."""

    def after_failure(self, trainer: "Trainer") -> None:
        """Training ends with an exception, perhaps on this rank alone: the others cannot be waited for."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of this callback: plain values, the same on every rank."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint again, before `before_training`."""


class Trainer:
    """Trains the model of a recipe on some data, resuming from the run folder when it holds a checkpoint.

    Needs process groups. `step` is the number of steps done; `tokens` the tokens of their batches, skipped ones too.
    """

    def __init__(self, recipe: Recipe, data: TrainingData, callbacks: Sequence[Callback]) -> None:
        self.recipe = recipe
        self.data = data
        self.callbacks = list(callbacks)
        self.metrics: Any = None  # the metrics writer, once ReportMetrics has made it
        self.step = 0
        self.tokens = 0
        self.num_batches = 0  # micro-batches that this process has taken, to train or to validate: a sign of life
        self._model_files: dict[str, bytes] = {}  # for checkpoints
        self.stop_reason: str | None = None  # why to stop after this step; the same on all ranks
        platform.seed_everything(recipe.run.seed)
        self.checkpoints = recipe.run.output_dir / "checkpoints"
        newest = newest_whole_checkpoint(self.checkpoints, reads_content=recipe.checkpoint.verify)
        self._origin = newest or recipe.training.init_from
        begins = self._origin is None
        seed = recipe.run.seed if begins else None
        gpts = build_chunks(recipe.model, recipe.parallel, recipe.training, seed=seed)
        if newest is None and recipe.training.init_from is not None:
            self._warn(start_warnings(recipe, recipe.training.init_from))
            load_weights(recipe.training.init_from, gpts)
            start_new_tokens(gpts, recipe, data.tokenizer_path)
        self.chunks = wrap_model(gpts, recipe)
        self.optimizer = build_optimizer(self.chunks, recipe)
        self.own_work = OwnWork(self.chunks)
        self.schedule = build_schedule(self.optimizer, recipe)
        if newest is not None:
            self._resume(newest)
        self._write_recipe()

    def fit(self) -> None:
        """Train until `training.num_steps`. Raises StoppedEarly when a callback has set `stop_reason` before."""
        if platform.is_first_rank():
            print(describe_kernels(get_model_config(self.chunks[0])), flush=True)
        # As they are now: the folder may be gone, or hold something else, when a checkpoint is due.
        self._model_files, notes = model_files(self.recipe, self.data.tokenizer_path, self._origin)
        if platform.is_first_rank() and notes:
            print("\n".join(notes), flush=True)
        try:
            self._train()
        except BaseException:
            for callback in self.callbacks:
                callback.after_failure(self)
            raise
        if self.step < self.recipe.training.num_steps:
            raise StoppedEarly(f"stopped after step {self.step} ({self.stop_reason}): the same command goes on")

    def _train(self) -> None:
        batches = self._begin()
        while not self.is_over:
            try:
                report = self._train_step(batches)
            except RollBack:
                batches = self._roll_back()
                continue
            except BadStep:
                self._end()
                raise
            for callback in self.callbacks:
                callback.after_step(self, report)
        self._end()

    @property
    def is_over(self) -> bool:
        """Whether there is no next step: all are done, or there is a reason to stop."""
        return self.step == self.recipe.training.num_steps or self.stop_reason is not None

    def _begin(self) -> TimedIterator:
        for callback in self.callbacks:
            callback.before_training(self)
        return TimedIterator(self.data.train.iterate(self.step, self.recipe.training.num_steps))

    def _end(self) -> None:
        for callback in self.callbacks:
            callback.after_training(self)

    def _roll_back(self) -> TimedIterator:
        self._end()
        newest = newest_whole_checkpoint(self.checkpoints, reads_content=self.recipe.checkpoint.verify)
        if newest is None:
            raise UserError(
                f"there is no checkpoint in {self.checkpoints} to go back to: give checkpoint.save_interval"
            )
        self._resume(newest)
        return self._begin()

    def _train_step(self, batches: TimedIterator) -> StepReport:
        begin, waited_before = time.perf_counter(), batches.waited_s
        self.own_work.start()
        learning_rate = current_learning_rate(self.optimizer)
        if self.recipe.training.skips(self.step + 1):
            return self._pass_over(begin)
        self._random_before = random_state()
        loss_sums = self._forward_backward(batches)
        if not all([callback.before_update(self, loss_sums) for callback in self.callbacks]):
            return self._pass_over(begin)
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient norm is {grad_norm} at step {self.step + 1} (learning rate {learning_rate:g}); "
                f"checkpoints of earlier steps are in {self.checkpoints}"
            )
        num_tokens = self._advance()
        seconds, waited_s = time.perf_counter() - begin, batches.waited_s - waited_before
        return StepReport(loss_sums, grad_norm, learning_rate, num_tokens, seconds, waited_s, self.own_work.seconds)

    def _forward_backward(self, batches: Any) -> torch.Tensor:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(self.data.train, batches, self.step)

    def run_again(self) -> torch.Tensor:
        """For `before_update`: the same batch forward and backward once more, with the same random numbers. Returns the
        loss sums; the gradients are replaced. All ranks call it."""
        set_random_state(self._random_before)
        return self._forward_backward(self.data.train.iterate(self.step, self.step + 1))

    def _pass_over(self, begin: float) -> StepReport:
        """Count a step that began at `begin` without an update."""
        learning_rate = current_learning_rate(self.optimizer)
        self._advance()
        no_loss = torch.zeros(len(self.data.source_names), 4, device=platform.device())
        return StepReport(no_loss, 0.0, learning_rate, 0, time.perf_counter() - begin, 0.0, 0.0)

    def _advance(self) -> int:
        """Count a step. Returns the tokens of its global batch."""
        num_tokens = self.recipe.training.batch_size(self.step) * self.recipe.training.sequence_length
        self.schedule.step(1)
        self.step += 1
        self.tokens += num_tokens
        return num_tokens

    def _run(self, loader: Loader, batches: Any, step: int, *, forward_only: bool = False) -> torch.Tensor:
        training = self.recipe.training
        return run_microbatches(
            self.chunks,
            self._counted(batches),
            num_microbatches=loader.num_microbatches(step),
            micro_batch_size=training.micro_batch_size,
            sequence_length=training.sequence_length,
            packed_attention=attention_is_packed(self.chunks[0], self.data.has_segments),
            num_sources=len(self.data.source_names),
            forward_only=forward_only,
        )

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.num_batches += 1
            yield batch

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses over the tokens of the validation batches, always the same ones: of all sets together and, where
        there are several, of each. A mean over no token is omitted. All ranks call it."""
        if not self.data.validation:
            raise UserError("there is no validation data: give data.validation")
        self.gather_weights()
        self._set_training(False)
        sums = {}
        for name, loader in self.data.validation.items():
            batches = loader.iterate(0, loader.num_steps)
            parts = [self._run(loader, batches, step, forward_only=True) for step in range(loader.num_steps)]
            sums[name] = LossSums(*reduce_sums(torch.stack(parts).sum(dim=(0, 1))).tolist())
        self._set_training(True)
        own = {f"loss/{name}": one.means()["loss"] for name, one in sums.items() if one.tokens}
        return sum(sums.values(), LossSums()).means(self.data.unmarked_name) | (own if len(sums) > 1 else {})

    def _set_training(self, training: bool) -> None:
        for chunk in self.chunks:
            chunk.train(training)

    @property
    def gpts(self) -> list[GPTModel]:
        """This rank's part of the model: one piece, or several under interleaved pipeline parallelism."""
        return [next(part for part in chunk.modules() if isinstance(part, GPTModel)) for chunk in self.chunks]

    @torch.no_grad()
    def gather_weights(self) -> None:
        """For who reads the weights between steps: with parallel.overlap_param_gather the next training step would
        gather what other data-parallel ranks have updated. It is done once after an update, for all who read and for
        that step. All ranks call it."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather and not chunk.ddp_config.use_megatron_fsdp:
                groups = chunk.bucket_groups + chunk.expert_parallel_bucket_groups
                if any(not one.param_gather_dispatched or one.param_gather_handle is not None for one in groups):
                    chunk.start_param_sync(force_sync=True)

    def start_saving(self) -> CheckpointSaving:
        """Lay out a checkpoint of the current step. All ranks call it. Raises SaveError on all of them."""
        self.gather_weights()
        states = {type(callback).__name__: callback.state() for callback in self.callbacks}
        num_samples = self.recipe.training.num_samples(self.step)
        return start_saving(
            step_folder(self.checkpoints, self.step),
            self.gpts,
            self.optimizer,
            {"step": self.step, "tokens": self.tokens, "samples": num_samples, "callbacks": states}
            | {"data": self.data.identity(num_samples), "learning_rate": current_learning_rate(self.optimizer)}
            | self._source_tokens(),
            recipe_yaml=to_yaml(self.recipe),
            model_files=self._model_files,
            optimizer_sharding=self.recipe.checkpoint.optimizer_sharding,
        )

    def _resume(self, folder: Path) -> None:
        require_tokenizer(folder, self.data.tokenizer_fingerprint)
        self._warn(resume_warnings(self.recipe, folder, read_trainer_state(folder), self.data.identity))
        state = load_checkpoint(folder, self.gpts, self.optimizer)
        self.step, self.tokens = state["step"], state["tokens"]
        self.schedule.num_steps = 0
        self.schedule.step(self.step)
        for callback in self.callbacks:
            if callback_state := state["callbacks"].get(type(callback).__name__):
                callback.load_state(callback_state)
        if platform.is_first_rank():
            print(f"resumed from {folder} at step {self.step}", flush=True)

    def _warn(self, warnings: Iterator[str]) -> None:
        for warning in list(warnings):
            if platform.is_first_rank():
                print(f"WARNING: {warning}", flush=True)

    def _source_tokens(self) -> dict[str, Any]:
        """For a checkpoint: the tokens taken from each source."""
        taken = self.data.source_tokens
        return {"source_tokens": taken.after(self.recipe.training.num_samples(self.step))} if taken else {}

    def _write_recipe(self) -> None:
        if platform.is_first_rank():
            with atomic_write(self.recipe.run.output_dir / "run.yaml") as path:
                path.write_text(to_yaml(self.recipe))
