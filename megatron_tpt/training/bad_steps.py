"""Steps whose loss or gradients are not finite, or whose loss jumps: found before the update, by all ranks together.

What then happens is the recipe's choice (section `faults`): stop with a diagnosis, leave the update out, or roll back
to the last checkpoint and pass over the data of the steps since.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from megatron_tpt import platform
from megatron_tpt.files import atomic_write
from megatron_tpt.training.trainer import BadStep, Callback, RollBack, Trainer

_NUM_NAMED = 3


def _gradients_are_finite(trainer: Trainer) -> torch.Tensor:
    """Whether all gradients of this rank are, a boolean on the device: one pass over the buffers that hold them."""
    buffers = [buffer for chunk in trainer.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return torch.stack([buffer.grad_data.sum(dtype=torch.float32).isfinite() for buffer in buffers]).all()


class CheckNumbers(Callback):
    """Refuses the update of a bad step, or ends the run, or rolls it back."""

    def __init__(self) -> None:
        self.losses: list[float] = []  # of the last good steps
        self.num_skipped = 0  # in a row
        self.num_rollbacks = 0
        self.passed_over: list[str] = []  # ranges of steps, as training.skip_steps has them
        self.bad_step: int | None = None  # what is being rolled back from

    def state(self) -> dict[str, Any]:
        names = ("losses", "num_skipped", "num_rollbacks", "passed_over")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        self.losses, self.num_skipped = list(state["losses"]), state["num_skipped"]
        # After a roll-back the checkpoint knows less of these than we do.
        self.num_rollbacks = max(self.num_rollbacks, state["num_rollbacks"])
        self.passed_over = list(dict.fromkeys(state["passed_over"] + self.passed_over))

    def before_training(self, trainer: Trainer) -> None:
        if self.bad_step is not None:
            self.passed_over.append(f"{trainer.step + 1}-{self.bad_step}")
            self.bad_step = None
        steps = trainer.recipe.training.skip_steps
        steps += [item for item in self.passed_over if item not in steps]

    def before_update(self, trainer: Trainer, loss_sums: torch.Tensor) -> bool:
        document_loss, document_tokens, thinking_loss, thinking_tokens = loss_sums.double().sum(dim=0)
        is_bad = (~_gradients_are_finite(trainer)).double()
        # Ranks that share a batch (tensor parallelism) count it several times, in both sums.
        totals = torch.stack([is_bad, document_loss + thinking_loss, document_tokens + thinking_tokens])
        torch.distributed.all_reduce(totals)
        num_bad_ranks, loss_sum, num_tokens = totals.tolist()
        loss = loss_sum / num_tokens if num_tokens else 0.0
        settings = trainer.recipe.faults
        if num_bad_ranks or not math.isfinite(loss):
            return self._handle(trainer, settings.on_nonfinite, f"loss {loss:.4g}, {_diagnose(trainer, loss_sums)}")
        if settings.on_loss_spike != "ignore" and self._is_spike(loss, settings.loss_spike_factor):
            usual = statistics.median(self.losses)
            return self._handle(trainer, settings.on_loss_spike, f"loss {loss:.4g} where {usual:.4g} is usual")
        self.losses = [*self.losses, loss][-settings.loss_spike_window :]
        self.num_skipped = 0
        return True

    def _is_spike(self, loss: float, factor: float) -> bool:
        return len(self.losses) >= 2 and loss > factor * statistics.median(self.losses)

    def _handle(self, trainer: Trainer, policy: str, problem: str) -> bool:
        """Returns False, for an update that is left out; raises RollBack or BadStep."""
        settings, step = trainer.recipe.faults, trainer.step + 1
        message = f"step {step} is bad: {problem}"
        if policy == "skip" and self.num_skipped < settings.max_skips:
            self.num_skipped += 1
            trainer.metrics.write(step, {"skipped_in_a_row": self.num_skipped})
            self._warn(f"{message}; its update is left out ({self.num_skipped} in a row)")
            return False
        if policy == "rollback" and self.num_rollbacks < settings.max_rollbacks:
            self.num_rollbacks += 1
            self.bad_step = step
            self._warn(f"{message}; back to the last checkpoint (roll-back {self.num_rollbacks})")
            raise RollBack
        raise BadStep(
            f"{message}; look into it, then have its data passed over (training.skip_steps=[{step}]) or choose what "
            f"happens (section faults), and run the same command again"
        )

    def _warn(self, message: str) -> None:
        if platform.is_first_rank():
            print(f"WARNING: {message}", flush=True)


def _diagnose(trainer: Trainer, loss_sums: torch.Tensor) -> str:
    """Who has what that is not finite, in one line; in full in RUN/logs/bad-step-*.json. All ranks call it."""
    loader, step = trainer.data.train, trainer.step
    named = [item for gpt in trainer.gpts for item in gpt.named_parameters()]
    own = {
        "rank": torch.distributed.get_rank(),
        "loss_is_finite": bool(loss_sums.isfinite().all()),
        "parameters": [name for name, value in named if not value.main_grad.isfinite().all()],
        "samples": [i for part in range(loader.num_microbatches(step)) for i in loader.sample_indices(step, part)],
    }
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    guilty = [one for one in every if one["parameters"] or not one["loss_is_finite"]]
    path: Path = trainer.recipe.run.output_dir / "logs" / f"bad-step-{step + 1:08d}.json"
    if platform.is_first_rank():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(guilty, indent=1))
    # A reduction spreads what one rank began: where a loss is not finite, it began.
    origins = [one for one in guilty if not one["loss_is_finite"]] or guilty
    names = list(dict.fromkeys(name for one in origins for name in one["parameters"]))
    shown = ", ".join(names[:_NUM_NAMED]) + (", ..." if len(names) > _NUM_NAMED else "")
    ranks = ", ".join(str(one["rank"]) for one in origins)
    samples = sorted({sample for one in origins for sample in one["samples"]})
    return (
        f"not finite on rank {ranks} (samples {samples[0]} to {samples[-1]} of the training data), in the gradients of "
        f"{len(names)} parameters ({shown}); more in {path}"
    )
