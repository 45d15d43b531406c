"""Detects hangs: every rank writes heartbeats; when a run hangs, the rank that blocks the others is named, and all end.

    RUN/heartbeat.json                     progress of the first rank, for monitoring; updated every few seconds
    RUN/logs/heartbeats/rank-00003.json    the same for every rank
    RUN/logs/hang-START/rank-00003.txt     the stacks of all threads of a rank, for the start of the run that hung
    RUN/logs/hang-START/nccl/rank_3        torch's flight recorder, if NCCL is used; to analyze that of all ranks:
                                           python -m torch.distributed.flight_recorder.fr_trace RUN/logs/hang-START/nccl

A run makes progress as long as its ranks take micro-batches, for training or validation, and finish steps and
checkpoints. From outside, a rank that waits in a collective looks like one that never reached it. Two things
distinguish them: the phases of a step (phases.py) have the same order on all ranks, so ranks in the earliest phase are
late; and among ranks in the same phase, those that are not in a communication call are late, which the stack of the
training thread shows.
"""

import contextlib
import dataclasses
import faulthandler
import json
import logging
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil
import torch

from megatron_tpt import platform
from megatron_tpt.files import atomic_write
from megatron_tpt.training.batches import Batch
from megatron_tpt.training.phases import PHASES, current_phase
from megatron_tpt.training.trainer import Callback, Trainer

logger = logging.getLogger(__name__)

_COLLECTIVES = "/torch/distributed/"
_BETWEEN_STAGES = "/megatron/core/pipeline_parallel/p2p_communication.py"
_MAX_INTERVAL_S = 15.0


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """The progress of a rank at some time."""

    rank: int
    host: str
    pid: int
    time: float
    """Seconds since 1970."""
    step: int
    """Steps done."""
    num_steps: int
    phase: str
    """One of PHASES; "done" or "stopped" when training has ended."""
    waits: bool = False
    """Whether it is in a communication call."""
    where: str = ""
    """The innermost Python line of the training thread."""

    @property
    def place(self) -> tuple[int, int, bool]:
        """The progress of the rank, as a key for comparison."""
        return self.step, PHASES.index(self.phase), self.waits


def name_the_late(beats: Sequence[Heartbeat], num_ranks: int) -> str:
    """The ranks that the other ranks wait for, in one line, from the newest heartbeats of the ranks that are alive."""
    silent = sorted(set(range(num_ranks)) - {beat.rank for beat in beats})
    if silent:
        return f"no sign of life from rank {', '.join(map(str, silent))}"
    earliest = min(beats, key=lambda beat: beat.place)
    late = sorted((beat for beat in beats if beat.place == earliest.place), key=lambda beat: beat.rank)
    where = f"after step {earliest.step}: {earliest.phase}, at {late[0].where}"
    if len(late) == num_ranks > 1:
        return f"all ranks are at the same place {where}"
    names = ", ".join(f"{beat.rank} ({beat.host})" for beat in late)
    return f"{'the others wait for ' if num_ranks > 1 else ''}rank {names} {where}"


def stack_of(thread_id: int) -> list[FrameType]:
    """The frames of a thread of this process, innermost first."""
    frame: FrameType | None = sys._current_frames()[thread_id]
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def is_waiting(stack: Sequence[FrameType]) -> bool:
    """Whether a thread with these frames, innermost first, is in a communication call. On GPUs, pipeline stages wait
    for each other in torch.cuda.synchronize, called from the communication function."""
    names = [frame.f_code.co_filename for frame in stack]
    return _COLLECTIVES in names[0] or any(name.endswith(_BETWEEN_STAGES) for name in names)


class Watchdog(Callback):
    """A thread on each rank that writes heartbeats, and ends the process when the run hangs: after run.hang_timeout_s
    without progress, or run.first_step_timeout_s before the first step is done, during a checkpoint and rollouts."""

    def __init__(self) -> None:
        self.is_over = threading.Event()

    def before_training(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.first_step = trainer.global_step
        self.rank, self.num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.timeout_s = trainer.recipe.run.resolved_hang_timeout_s
        self.interval_s = min(_MAX_INTERVAL_S, self.timeout_s / 10)
        self.thread_id = threading.get_ident()
        self.logs = trainer.recipe.run.output_dir / "logs"
        (self.logs / "heartbeats").mkdir(parents=True, exist_ok=True)
        self._write(self._beat("between steps"))
        start = platform.from_first_rank(lambda: time.strftime("%Y%m%d-%H%M%S", time.gmtime()))
        self.hang_folder = self.logs / f"hang-{start}"  # every rank has a heartbeat now
        self.is_over.clear()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def after_training(self, trainer: Trainer) -> None:
        self.is_over.set()
        self.thread.join()
        self._write(self._beat("done" if trainer.global_step == trainer.recipe.training.num_steps else "stopped"))

    def after_failure(self, trainer: Trainer) -> None:
        self.is_over.set()

    def _beat(self, phase: str, waits: bool = False, where: str = "") -> Heartbeat:
        step, num_steps = self.trainer.global_step, self.trainer.recipe.training.num_steps
        return Heartbeat(
            self.rank, socket.gethostname(), os.getpid(), time.time(), step, num_steps, phase, waits, where
        )

    def _observe(self) -> Heartbeat:
        """The current heartbeat, from the stack of the training thread."""
        stack = stack_of(self.thread_id)
        innermost = stack[0]
        file_name = "/".join(Path(innermost.f_code.co_filename).parts[-2:])
        where = f"{file_name}:{innermost.f_lineno} {innermost.f_code.co_qualname}"
        return self._beat(current_phase(), is_waiting(stack), where)

    def _beat_path(self, rank: int) -> Path:
        return self.logs / "heartbeats" / f"rank-{rank:05d}.json"

    def _write(self, beat: Heartbeat) -> None:
        paths = [self._beat_path(self.rank)]
        if self.rank == 0:
            paths.append(self.logs.parent / "heartbeat.json")
        for path in paths:
            with (
                contextlib.suppress(OSError),
                atomic_write(path, durable=False) as temporary,
            ):  # a full disk does not end the run
                temporary.write_text(json.dumps(dataclasses.asdict(beat)))

    def _watch(self) -> None:
        progress, waited_s = None, 0.0
        while not self.is_over.wait(self.interval_s):
            beat = self._observe()
            self._write(beat)
            # Only time during which this thread ran counts, since a whole job may be suspended.
            waited_s += self.interval_s
            if (latest := (beat.step, Batch.num_taken, beat.phase)) != progress:
                progress, waited_s = latest, 0.0
            if waited_s >= self._limit_s(beat) or self.hang_folder.exists():
                self._end(waited_s)

    def _limit_s(self, beat: Heartbeat) -> float:
        is_long = beat.phase in ("checkpoint", "rollouts")
        if self.timeout_s == math.inf or (beat.step > self.first_step and not is_long):
            return self.timeout_s
        return max(self.timeout_s, 0.9 * self.trainer.recipe.run.first_step_timeout_s)  # before collectives fail

    def _end(self, waited_s: float) -> None:
        """Dump diagnostics and end this process, since the training thread is stuck."""
        try:
            self._dump()
            time.sleep(3 * self.interval_s)  # so that the other ranks notice and do the same
            beats = list(self._read_beats())
            if self.rank == min((beat.rank for beat in beats), default=self.rank):
                logger.error(
                    f"no progress for {waited_s:.0f} s (run.hang_timeout_s): "
                    f"{name_the_late(beats, self.num_ranks)}; stacks are in {self.hang_folder}"
                )
        except Exception:
            traceback.print_exc()
        for process in psutil.Process().children(recursive=True):
            process.kill()  # a data-loading process that hangs would outlive its parent
        os._exit(1)

    def _dump(self) -> None:
        self.hang_folder.mkdir(exist_ok=True)  # the other ranks look for it
        with (self.hang_folder / f"rank-{self.rank:05d}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if torch.distributed.get_backend() == "nccl":
            trace = self.hang_folder / "nccl" / f"rank_{self.rank}"
            trace.parent.mkdir(exist_ok=True)
            trace.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())

    def _read_beats(self) -> Iterator[Heartbeat]:
        """The newest heartbeat of every rank that is alive, by the clock of the file system, since those of the
        machines may differ and jump."""
        paths = [path for path in map(self._beat_path, range(self.num_ranks)) if path.exists()]
        newest = max((path.stat().st_mtime for path in paths), default=0.0)
        for path in paths:
            if path.stat().st_mtime >= newest - self.timeout_s / 2:
                yield Heartbeat(**json.loads(path.read_text()))
