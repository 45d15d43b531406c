"""The rollouts of an iteration, in waves: some prompts are sampled and graded by all ranks together, then logged.

What a wave contains depends on the weights, the seed and the waves before it alone, so that an interrupted iteration
is completed with what it would have had: on a CPU to the bit, since a wave that was interrupted is sampled as a whole.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_tpt import platform
from megatron_tpt.errors import UserError
from megatron_tpt.generation import Engine, ScoringRequest
from megatron_tpt.names import counted
from megatron_tpt.rl.engine import OwnEngine
from megatron_tpt.rl.experience import CORRECT, Sample
from megatron_tpt.rl.outcomes import Rewarder
from megatron_tpt.rl.prompts import Prompts
from megatron_tpt.rl.rollout_log import RolloutLog
from megatron_tpt.rl.rollouts import (
    Rollout,
    RolloutOptions,
    RolloutPrompt,
    TrainerLogProbabilities,
    check_probes,
    probe_engine,
    sample_rollouts,
    send_weights,
)
from megatron_tpt.training.phases import phase

if TYPE_CHECKING:
    from megatron_tpt.recipes.rl import RLRecipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """The trainer's weights, for the engines of all ranks."""

    tensors: Callable[[], Iterable[tuple[str, Tensor]]]
    """All of them by name, again at every call. All ranks call it."""
    version: int
    log_probabilities: TrainerLogProbabilities


@dataclass
class Collected:
    """The rollouts of an iteration."""

    samples: list[Sample]
    """By prompt and number; those of dropped groups, too."""
    next_position: int
    """Of the first prompt that is not sampled."""
    probe_metrics: dict[str, float]
    """The mismatch of engine and trainer after the last update of the weights."""
    seconds: dict[str, float]
    """By what they were spent on, on this rank."""

    @property
    def used(self) -> list[Sample]:
        """The rollouts to train on."""
        return [one for one in self.samples if one.is_used]


class Collector:
    """Samples and grades. All ranks call it."""

    def __init__(
        self, recipe: "RLRecipe", engine: OwnEngine, rewarder: Rewarder, prompts: Prompts, log: RolloutLog | None
    ) -> None:
        """`log` is the first rank's."""
        self._settings = recipe.rollouts
        self._options = RolloutOptions(
            num_samples=recipe.rollouts.num_samples,
            temperature=recipe.rollouts.temperature,
            max_new_tokens=recipe.rollouts.max_new_tokens,
            seed=recipe.run.seed,
        )
        self._engine, self._rewarder, self._prompts, self._log = engine, rewarder, prompts, log
        self._seconds: dict[str, float] = {}

    @phase("rollouts")
    def __call__(self, iteration: int, position: int, weights: Weights) -> Collected:
        """The rollouts of an iteration whose first prompt is at `position`."""
        self._seconds = dict.fromkeys(("weights", "generation", "grading"), 0.0)
        waves = platform.from_first_rank(lambda: self._log.read_waves(iteration) if self._log is not None else [])
        if waves:
            logger.info(f"iteration {iteration}: {counted(len(waves), 'wave')} sampled before")
        metrics: dict[str, float] = {}
        while missing := self._num_missing(waves):
            if self._settings.dynamic_sampling and len(waves) >= self._settings.max_waves:
                groups = counted(self._settings.num_prompts - missing, "prompt")
                raise UserError(
                    f"iteration {iteration} has {groups} whose rollouts differ in reward after "
                    f"{counted(len(waves), 'wave')} (rollouts.max_waves): give prompts that are neither too easy nor "
                    f"too hard, raise it, or turn rollouts.dynamic_sampling off"
                )
            first = self._next_position(waves, position)
            metrics, wave = self._wave(iteration, range(first, first + missing), weights)
            waves.append(wave)
        return Collected(self._chosen(waves), self._next_position(waves, position), metrics, self._seconds)

    def _update(self, engine: Engine, weights: Weights) -> None:
        """Send the weights. It also empties the engine's cache, on which the last bits of a wave could depend."""
        with timed(self._seconds, "weights"):
            send_weights(engine, weights.tensors(), weights.version)

    def _probe(self, engine: Engine) -> list[tuple[ScoringRequest, Rollout]]:
        with timed(self._seconds, "weights"):
            ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
            return probe_engine(engine, self._prompts.probes(), *ranks)

    def _wave(self, iteration: int, positions: range, weights: Weights) -> tuple[dict[str, float], list[Sample]]:
        """The mismatch of engine and trainer; and the graded rollouts of the prompts at these positions, of which every
        rank samples its share."""
        positions = positions[: self._settings.prompts_per_wave]
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        own = {str(position): (position, self._prompts[position]) for position in positions[rank::size]}
        asked = [RolloutPrompt(name, prompt.token_ids) for name, (_, prompt) in own.items()]

        def sample(engine: Engine) -> list[Rollout]:
            with timed(self._seconds, "generation"):
                return list(sample_rollouts(engine, asked, self._options, iteration=iteration))

        metrics, rollouts = self._engine.sample(
            lambda engine: self._update(engine, weights),
            self._probe,
            lambda probed: check_probes(probed, weights.log_probabilities, max_gap=self._settings.max_gap),
            sample,
        )
        with timed(self._seconds, "grading"):
            graded = self._rewarder.grade([(*own[one.key.prompt_id], one) for one in rollouts])
        every = [sample for part in platform.gather_objects(graded) for sample in part]
        wave = sorted(every, key=lambda one: (one.position, one.sample))
        if self._log is not None:
            self._log.add_wave(iteration, wave)
        return metrics, wave

    def _next_position(self, waves: list[list[Sample]], position: int) -> int:
        return waves[-1][-1].position + 1 if waves else position

    def _num_missing(self, waves: list[list[Sample]]) -> int:
        """Prompts to sample until there are enough groups."""
        groups = _by_position(waves)
        num_kept = sum(map(_teaches, groups.values())) if self._settings.dynamic_sampling else len(groups)
        return max(0, self._settings.num_prompts - num_kept)

    def _chosen(self, waves: list[list[Sample]]) -> list[Sample]:
        """All samples, those of the groups that are not trained on marked."""
        if not self._settings.dynamic_sampling:
            return [sample for wave in waves for sample in wave]
        return [
            sample if _teaches(group) else replace(sample, is_used=False)
            for group in _by_position(waves).values()
            for sample in group
        ]


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time that the block takes to what is spent on `name`."""
    begin = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin


def _by_position(waves: list[list[Sample]]) -> dict[int, list[Sample]]:
    groups: dict[int, list[Sample]] = {}
    for sample in (sample for wave in waves for sample in wave):
        groups.setdefault(sample.position, []).append(sample)
    return groups


def _teaches(group: list[Sample]) -> bool:
    """Whether the answers of a group differ in their reward."""
    return len({one.rewards[CORRECT] for one in group}) > 1
