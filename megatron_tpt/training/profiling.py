"""Traces of some steps: CPU and GPU activity over time (torch.profiler), and GPU memory allocations."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_tpt import platform
from megatron_tpt.errors import UserError
from megatron_tpt.logs import ALL_RANKS
from megatron_tpt.training.trainer import Callback, StepReport, Trainer

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Profile(Callback):
    """Writes RUN/profile/steps-FIRST-LAST-rank-R.trace.json.gz (chrome://tracing, Perfetto) of the ranks and steps in
    the section `profiling`; with `memory` also .memory.pickle, which https://pytorch.org/memory_viz opens."""

    max_memory_events: int = 1_000_000
    """Allocations that profiling.memory keeps: the newest."""
    profiler: Any = field(default=None, init=False)

    def before_training(self, trainer: Trainer) -> None:
        settings = trainer.recipe.profiling
        if settings.first_step is None:
            return
        if settings.memory and not torch.cuda.is_available():
            raise UserError("profiling.memory records a GPU's memory, and there is no GPU: turn it off")
        beyond = [rank for rank in settings.ranks if rank >= torch.distributed.get_world_size()]
        if beyond:
            raise UserError(f"profiling.ranks: there are no ranks {beyond} among {torch.distributed.get_world_size()}")
        self._begin(trainer)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        settings = trainer.recipe.profiling
        if self.profiler is not None and settings.first_step is not None:
            if trainer.global_step == settings.first_step + settings.num_steps - 1:
                self._end(trainer)
        else:
            self._begin(trainer)

    def after_training(self, trainer: Trainer) -> None:
        if self.profiler is not None:
            self._end(trainer)

    def _begin(self, trainer: Trainer) -> None:
        """Start if the next step is the first to trace, on the requested ranks."""
        settings = trainer.recipe.profiling
        if trainer.global_step + 1 != settings.first_step or torch.distributed.get_rank() not in settings.ranks:
            return
        if settings.memory:
            torch.cuda.memory._record_memory_history(max_entries=self.max_memory_events)
        self.profiler = torch.profiler.profile(record_shapes=settings.shapes, with_stack=settings.stacks)
        self.profiler.start()

    def _end(self, trainer: Trainer) -> None:
        settings = trainer.recipe.profiling
        name = f"steps-{settings.first_step}-{trainer.global_step}-rank-{torch.distributed.get_rank()}"
        path: Path = trainer.recipe.run.output_dir / "profile" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize(platform.device())  # kernels of the last step may still run
        self.profiler.stop()
        self.profiler.export_chrome_trace(f"{path}.trace.json.gz")
        if settings.memory:
            torch.cuda.memory._dump_snapshot(f"{path}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        self.profiler = None
        logger.info(f"profile: {path}.*", extra=ALL_RANKS)
