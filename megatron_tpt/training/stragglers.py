"""Ranks that are slower than the others at their own work: reading data, forward and backward.

That is the part of a step up to the reduction of gradients, where data-parallel ranks begin to wait for one another.
Ranks that share a copy of the model wait for one another before that, so a straggler shows in its whole copy; and
stages of a pipeline differ by what they hold, so a rank is compared with those of its own stage.
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
    """This moment; on a GPU an event, which passes when the kernels before it are done."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class OwnWork:
    """Times every step from `start` to the reduction of gradients of the model of which `chunks` are pieces."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._begin = self._end = _now()
        config = get_model_config(chunks[0])  # the schedules ask the first piece
        reduce_gradients = config.finalize_model_grads_func

        def stop_and_reduce(*arguments: Any, **options: Any) -> None:
            self._end = _now()
            reduce_gradients(*arguments, **options)

        config.finalize_model_grads_func = stop_and_reduce

    def start(self) -> None:
        """A step begins."""
        self._begin = _now()

    @property
    def seconds(self) -> float:
        """Of the last step; read after the update, so that it waits for no GPU."""
        if isinstance(self._begin, float):
            return self._end - self._begin
        return self._begin.elapsed_time(self._end) / 1000


@dataclasses.dataclass
class Slowdown:
    """How much slower one rank is than the median of its pipeline stage."""

    rank: int
    ratio: float
    seconds: float
    """Its own work of one step."""


def slowdowns(seconds: Sequence[float], stages: Sequence[int]) -> list[Slowdown]:
    """The slowdown of every rank, from the own work of one step and the pipeline stage of each.

    The median is the lower of the two in the middle: of two ranks one can be the slow one. Ranks that did nothing (all
    steps were skipped) are not slow.
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
    """Compares the ranks; made, and called, on all of them together."""

    def __init__(self) -> None:
        self.names = platform.gather_objects(platform.rank_name())

    def compare(self, seconds: float) -> list[Slowdown]:
        """The slowdown of every rank, from this rank's own work of one step."""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        own = torch.tensor([seconds, stage], dtype=torch.float64, device=platform.device())
        every = [torch.empty_like(own) for _ in self.names]
        torch.distributed.all_gather(every, own)
        values = torch.stack(every).tolist()
        return slowdowns([value[0] for value in values], [int(value[1]) for value in values])

    def warn(self, found: Sequence[Slowdown], factor: float) -> None:
        """Name the ranks that are slower than `factor` times the median, the slowest first."""
        for one in sorted(found, key=lambda one: -one.ratio):
            if one.ratio > factor:
                logger.warning(
                    f"rank {self.names[one.rank]} is slow: its own work (data, forward, backward) takes "
                    f"{one.seconds:.3g} s a step, {one.ratio:.1f} times the median; the others wait for it"
                )
