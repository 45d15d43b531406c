"""Steps whose loss or gradients are not finite, or whose loss spikes: all ranks detect them before the update.

The step is first recomputed (faults.rerun): a result that is not reproduced points to the hardware. (Megatron Core's
rerun state machine does the same for losses but not for gradients; to continue, it has to write a checkpoint, end the
program with its own exit code and be restarted on other GPUs.)

The section `faults` of the recipe says what happens then: stop with a diagnosis, skip the update, or roll back to the
last checkpoint and skip the data of the steps since.
"""

import dataclasses
import json
import logging
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from megatron_tpt import platform
from megatron_tpt.config.run import FaultsConfig
from megatron_tpt.files import atomic_write
from megatron_tpt.names import first_few
from megatron_tpt.training.optimizer import local_gradient
from megatron_tpt.training.trainer import BadStep, Callback, RollBack, Trainer

logger = logging.getLogger(__name__)

_NUM_NAMED = 3
# Different rounding changes the norm of thousands of gradients by far less than this, a fault by more.
_TOLERANCE = 1e-3


@dataclasses.dataclass
class _Result:
    """The result of one forward and backward pass."""

    own_losses: torch.Tensor
    """This rank's sums of the objective [num_sums], before any reduction over ranks."""
    gradient_norms: torch.Tensor
    """Norms of the buffers that hold the gradients, [num_buffers], or of their shards. Equal on ranks that reduced them
    together."""
    loss: float
    """Mean over the global batch."""
    is_finite: bool
    """Whether loss and gradients are finite on all ranks."""
    has_tokens: bool = True
    """Whether there was a token to learn from: a step without any does not count for the median loss."""


def _measure(trainer: Trainer, sums: torch.Tensor) -> _Result:
    """Needs one pass over the gradients, one reduction and one device synchronization."""
    if trainer.recipe.parallel.fsdp != "none":
        gradients = [local_gradient(value) for gpt in trainer.model.gpts for value in gpt.parameters()]
    else:
        chunks = trainer.model.chunks
        buffers = [buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        gradients = [buffer.grad_data for buffer in buffers]
    gradient_norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients])
    is_bad = (~gradient_norms.isfinite().all()).double()
    # Loss and tokens. Ranks that share a batch (tensor parallelism) count it several times, in both.
    totals = torch.cat([is_bad[None], sums[:2]])
    torch.distributed.all_reduce(totals)
    num_bad_ranks, loss_sum, num_tokens = totals.tolist()
    loss = loss_sum / num_tokens if num_tokens else 0.0
    is_finite = not num_bad_ranks and math.isfinite(loss)
    return _Result(sums.clone(), gradient_norms, loss, is_finite, has_tokens=num_tokens > 0)


class CheckNumbers(Callback):
    """Skips the update of a bad step, ends the run, or rolls it back."""

    def __init__(self) -> None:
        self.losses: list[float] = []  # of the last good steps
        self.num_skipped = 0  # in a row
        self.num_rollbacks = 0
        self.excluded: list[str] = []  # ranges of steps rolled back from: FIRST-LAST
        self.bad_step: int | None = None  # the step that a roll-back in progress comes from

    def state(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("losses", "num_skipped", "num_rollbacks")}
        return state | {"passed_over": self.excluded}

    def load_state(self, state: dict[str, Any]) -> None:
        self.losses, self.num_skipped = list(state["losses"]), state["num_skipped"]
        # After a roll-back the checkpoint holds fewer of these than this object does.
        self.num_rollbacks = max(self.num_rollbacks, state["num_rollbacks"])
        self.excluded = list(dict.fromkeys(state["passed_over"] + self.excluded))

    def before_training(self, trainer: Trainer) -> None:
        if self.bad_step is not None:
            self.excluded.append(f"{trainer.global_step + 1}-{self.bad_step}")
            self.bad_step = None
        for first, last in (map(int, steps.split("-")) for steps in self.excluded):
            trainer.excluded_steps.update(range(first, last + 1))

    def before_update(self, trainer: Trainer, sums: torch.Tensor) -> bool:
        settings = trainer.recipe.faults
        result = _measure(trainer, sums)
        if not self._is_bad(result, settings):
            return self._accept(result, settings)
        if result.is_finite:
            policy, problem = settings.on_loss_spike, f"against a median of {statistics.median(self.losses):.4g}"
        else:
            policy, problem = settings.on_nonfinite, _diagnose(trainer, sums)
        problem = f"loss {result.loss:.4g}, {problem}"
        if settings.rerun != "off" and trainer.recipe.training.fp8 == "delayed":
            problem += "; not computed again (faults.rerun): the scales of training.fp8=delayed have changed since"
        elif settings.rerun != "off":
            sums.copy_(trainer.run_again())
            second = _measure(trainer, sums)
            is_good = not self._is_bad(second, settings)
            problem += f"; {_compare(result, second, is_good)}"
            if is_good and settings.rerun == "recover":
                logger.warning(
                    f"step {trainer.global_step + 1} was bad: {problem}; training continues with the second result"
                )
                return self._accept(second, settings)
        return self._handle(trainer, policy, problem)

    def _accept(self, result: _Result, settings: FaultsConfig) -> bool:
        if result.has_tokens:
            self.losses = [*self.losses, result.loss][-settings.loss_spike_window :]
        self.num_skipped = 0
        return True

    def _is_bad(self, result: _Result, settings: FaultsConfig) -> bool:
        if settings.on_loss_spike == "ignore" or len(self.losses) < 2:
            return not result.is_finite
        return not (result.is_finite and result.loss <= settings.loss_spike_factor * statistics.median(self.losses))

    def _handle(self, trainer: Trainer, policy: str, problem: str) -> bool:
        """Returns False for an update that is skipped; raises RollBack or BadStep."""
        settings, step = trainer.recipe.faults, trainer.global_step + 1
        message = f"step {step} is bad: {problem}"
        if policy == "skip" and self.num_skipped < settings.max_skips:
            self.num_skipped += 1
            trainer.metrics.write(step, {"skipped_in_a_row": self.num_skipped})
            logger.warning(f"{message}; its update is skipped ({self.num_skipped} in a row)")
            return False
        if policy == "rollback" and self.num_rollbacks < settings.max_rollbacks:
            self.num_rollbacks += 1
            self.bad_step = step
            logger.warning(f"{message}; back to the last checkpoint (roll-back {self.num_rollbacks})")
            raise RollBack
        raise BadStep(
            f"{message}; investigate it, then skip its data (training.skip_steps=[{step}]) or choose another "
            f"policy (section faults), and run the same command again"
        )


def _compare(first: _Result, second: _Result, is_good: bool) -> str:
    """The diagnosis from comparing both results of a bad step, in one line. All ranks call it."""
    own: dict[str, Any] = {
        "name": platform.rank_name(),
        "losses": _are_alike(first.own_losses, second.own_losses),
        "gradients": _are_alike(first.gradient_norms, second.gradient_norms),
    }
    every = platform.gather_objects(own)
    # Reductions spread wrong gradients of one rank to others; wrong losses only spread within a model replica.
    what = "losses" if not all(one["losses"] for one in every) else "gradients"
    ranks = ", ".join(one["name"] for one in every if not one[what])
    if not ranks:
        return "run again, the same batch gave the same result on all ranks: suspect the data or the software"
    if is_good:
        return (
            f"TRANSIENT: run again, the same batch gave a good result, loss {second.loss:.4g}, with other {what} on "
            f"rank {ranks}: suspect the hardware there"
            + (" or of a rank that they are reduced with" if what == "gradients" else "")
        )
    return (
        f"run again, the same batch gave a bad result again, with other {what} on rank {ranks}: hardware that fails "
        f"often"
    )


def _are_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to rounding, since kernels may sum in any order, as the backward pass of attention on GPUs does; NaN
    equals NaN."""
    return bool(torch.isclose(a, b, rtol=_TOLERANCE, atol=0.0, equal_nan=True).all())


def _diagnose(trainer: Trainer, sums: torch.Tensor) -> str:
    """The ranks with non-finite values, in one line; details go to RUN/logs/bad-step-*.json. All ranks call it."""
    loader, step = trainer.data.train, trainer.global_step
    named = [item for gpt in trainer.model.gpts for item in gpt.named_parameters()]
    own: dict[str, Any] = {
        "rank": torch.distributed.get_rank(),
        "loss_is_finite": bool(sums.isfinite().all()),
        "parameters": [name for name, value in named if not local_gradient(value).isfinite().all()],
        "samples": [i for part in range(loader.num_microbatches(step)) for i in loader.sample_indices(step, part)],
    }
    every = platform.gather_objects(own)
    guilty = [one for one in every if one["parameters"] or not one["loss_is_finite"]]
    path: Path = trainer.recipe.run.output_dir / "logs" / f"bad-step-{step + 1:08d}.json"
    if platform.is_first_rank():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(guilty, indent=1))
    # Reductions spread non-finite gradients to all ranks: the origin is where a loss is not finite.
    origins = [one for one in guilty if not one["loss_is_finite"]] or guilty
    names = list(dict.fromkeys(name for one in origins for name in one["parameters"]))
    ranks = ", ".join(str(one["rank"]) for one in origins)
    samples = sorted({sample for one in origins for sample in one["samples"]})
    return (
        f"not finite on rank {ranks} (samples {samples[0]} to {samples[-1]} of the training data), in the gradients of "
        f"{len(names)} parameters ({first_few(names, _NUM_NAMED)}); more in {path}"
    )
