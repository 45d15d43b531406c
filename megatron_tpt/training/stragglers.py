"""Stragglers: ranks whose local work (reading data, forward, backward) takes longer than that of other ranks.

Local work is the part of a step before gradients are reduced, where data-parallel ranks begin to wait for each other.
Ranks that share a model replica wait for each other earlier, so a straggler slows its whole replica. Pipeline stages
have different amounts of work, so a rank is compared with the ranks of its own stage.
"""

import dataclasses
import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from megatron_tpt import platform

from megatron.core import parallel_state
from megatron.core.utils import get_model_config

logger = logging.getLogger(__name__)


def _now() -> Any:
    """The current time; on a GPU an event that is recorded once the kernels before it have finished."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class OwnWork:
    """Times the local work of every step: from `start` until the gradients of the model `chunks` are reduced."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._begin = self._end = _now()
        config = get_model_config(chunks[0])  # the one that the schedules read
        reduce_gradients = config.finalize_model_grads_func

        def stop_and_reduce(*arguments: Any, **options: Any) -> None:
            self._end = _now()
            reduce_gradients(*arguments, **options)

        config.finalize_model_grads_func = stop_and_reduce

    def start(self) -> None:
        """Mark the beginning of a step."""
        self._begin = _now()

    @property
    def seconds(self) -> float:
        """Local work of the last step. Read it after the update, so that it does not wait for the GPU."""
        if isinstance(self._begin, float):
            return self._end - self._begin
        return self._begin.elapsed_time(self._end) / 1000


@dataclasses.dataclass
class Slowdown:
    """How much slower one rank is than the median of its pipeline stage."""

    rank: int
    ratio: float
    seconds: float
    """Its local work per step."""


def slowdowns(seconds: Sequence[float], stages: Sequence[int]) -> list[Slowdown]:
    """The slowdown of every rank, from the local work per step and the pipeline stage of each rank.

    The median of an even number of values is the lower of the two in the middle, so that one of two ranks can be slow.
    Ranks without work (all steps were skipped) are not slow.
    """
    usual = {
        stage: statistics.median_low(s for s, own in zip(seconds, stages, strict=True) if own == stage)
        for stage in set(stages)
    }
    return [
        Slowdown(rank, s / usual[stage] if s else 1.0, s)
        for rank, (s, stage) in enumerate(zip(seconds, stages, strict=True))
    ]


class Stragglers:
    """Compares the ranks. All ranks construct it and call its methods together."""

    def __init__(self) -> None:
        self.names = platform.gather_objects(platform.rank_name())

    def compare(self, seconds: float) -> list[Slowdown]:
        """The slowdown of every rank. `seconds` is this rank's local work per step. All ranks call it."""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        own = torch.tensor([seconds, stage], dtype=torch.float64, device=platform.device())
        every = [torch.empty_like(own) for _ in self.names]
        torch.distributed.all_gather(every, own)
        values = torch.stack(every).tolist()
        return slowdowns([value[0] for value in values], [int(value[1]) for value in values])

    def warn(self, found: Sequence[Slowdown], factor: float) -> None:
        """Warn of ranks that take more than `factor` times the median, the slowest first."""
        for one in sorted(found, key=lambda one: -one.ratio):
            if one.ratio > factor:
                logger.warning(
                    f"rank {self.names[one.rank]} is slow: data, forward and backward take "
                    f"{one.seconds:.3g} s per step, {one.ratio:.1f} times the median; the other ranks wait for it"
                )
