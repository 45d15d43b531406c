"""How far a training run is, from the files in its folder (docs/formats.md has them)."""

import math
import shutil
from collections.abc import Iterator
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_tpt.config.load import read_yaml
from megatron_tpt.errors import UserError
from megatron_tpt.monitoring.state import State, Status, last_objects, modified, read_fields
from megatron_tpt.training.checkpoint_files import finished_checkpoints, step_number
from megatron_tpt.training.requests import STOP
from megatron_tpt.training.run_lock import LOCK, PATIENCE_S
from megatron_tpt.units import GIB, duration

# The newest report and the newest validation of a run are in these last bytes, unless 1,000 reports lie between them.
_TAIL_BYTES = 1 << 20
_MAX_DATA_WAIT = 0.1
_LONG_START_S = 600.0
_LOSSES = {"loss", "loss_document", "loss_thinking", "loss_answer"}


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run."""
    return any((folder / name).exists() for name in ("run.yaml", "heartbeat.json", "metrics.jsonl"))


def read_run(folder: Path, now: float) -> Status:
    """How far a run is at `now`, in seconds since 1970."""
    return _Run(folder, now).status()


class _Run:
    """The files of a run, each read at most once."""

    def __init__(self, folder: Path, now: float) -> None:
        self.folder = folder
        self.now = now
        beat = read_fields(folder / "heartbeat.json")
        self.beat: dict[str, Any] = beat if {"time", "step", "phase"} <= beat.keys() else {}
        self.values: dict[str, Any] = {}
        for line in last_objects(folder / "metrics.jsonl", _TAIL_BYTES):
            self.values |= line
        checkpoints = finished_checkpoints(folder / "checkpoints")
        self.checkpoint = checkpoints[-1] if checkpoints else None

    def status(self) -> Status:
        """All that is known."""
        step, num_steps, checkpoint = self.step, self.num_steps, self.checkpoint
        left = self.values.get("remaining_s")
        return Status(
            folder=self.folder,
            kind="run",
            state=self.state,
            step=step,
            num_steps=num_steps,
            share=step / num_steps if step is not None and num_steps else None,
            losses={name: value for name, value in self.values.items() if _is_loss(name)},
            tokens=self.values.get("tokens"),
            tokens_per_s=self.values.get("tokens_per_s"),
            mfu=self.values.get("mfu"),
            remaining_s=max(0.0, left - self.age("metrics.jsonl")) if left and self.state == "running" else None,
            checkpoint_step=step_number(checkpoint) if checkpoint is not None else None,
            checkpoint_age_s=self.age(f"checkpoints/{checkpoint.name}") if checkpoint is not None else None,
            heartbeat_age_s=max(0.0, self.now - self.beat["time"]) if self.beat else None,
            warnings=list(self.warnings()),
        )

    def age(self, name: str) -> float:
        """Seconds since a file in the folder was modified; 0 where it is absent."""
        then = modified(self.folder / name)
        return max(0.0, self.now - then) if then is not None else 0.0

    @property
    def step(self) -> int | None:
        """Steps done."""
        return self.beat.get("step", self.values.get("step"))

    @property
    def num_steps(self) -> int | None:
        """Of the whole run."""
        return self.beat.get("num_steps") or (self.recipe.get("training") or {}).get("num_steps")

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe; empty where it cannot be read."""
        try:
            return read_yaml(self.folder / "run.yaml")
        except (OSError, UserError):
            return {}

    @cached_property
    def held_since(self) -> float | None:
        """Since when a process holds the folder, in seconds since 1970; None where none does. One that was killed
        leaves its lock behind."""
        if (created := modified(self.folder / LOCK)) is None:
            return None
        try:
            return datetime.fromisoformat(read_fields(self.folder / LOCK)["since"]).timestamp()
        except (KeyError, TypeError, ValueError):  # another user's, or one that is being written
            return created

    @cached_property
    def state(self) -> State:
        """What the run is doing."""
        phase = self.beat.get("phase")
        if self.held_since is not None and self.held_since > self.beat.get("time", 0.0):
            # No heartbeat since it was started; the lock itself is touched every few seconds.
            return "starting" if self.age(LOCK) < PATIENCE_S else "silent"
        if phase in ("done", "stopped"):
            return "finished" if phase == "done" else "stopped"
        if self.held_since is None:
            return "failed"
        return "running" if self.now - self.beat["time"] < PATIENCE_S else "silent"

    def warnings(self) -> Iterator[str]:
        """What may need someone: one line each."""
        if self.state == "silent":
            silent_s = self.now - self.beat["time"] if self.beat else self.age(LOCK)
            yield f"no sign of life for {duration(silent_s)}: it hangs, was killed, or its node is lost"
        elif self.state == "failed":
            where = f"in step {self.beat['step'] + 1} ({self.beat['phase']})" if self.beat else "before its first step"
            yield f"ended {where}: its output says why"
        elif self.state == "running":
            yield from self.silent_ranks()
        elif self.held_since is not None and self.state == "starting" and self.now - self.held_since > _LONG_START_S:
            yield f"started {duration(self.now - self.held_since)} ago, and has no heartbeat yet"
        if (self.folder / STOP).exists() and self.state != "finished":
            yield f"asked to stop: remove {self.folder / STOP} to train on"
        for name in ("loss", "validation_loss"):
            if name in self.values and self.values[name] is None:
                yield f"{name} was not finite in the last report"
        yield from self.slow_parts()
        yield from self.incidents()
        if self.checkpoint is not None and self.state in ("running", "starting"):
            free = shutil.disk_usage(self.folder).free
            size = sum(path.stat().st_size for path in self.checkpoint.rglob("*") if path.is_file())
            if free < size:
                yield f"the disk has {free / GIB:.1f} GiB free, and a checkpoint takes {size / GIB:.1f} GiB"

    def silent_ranks(self) -> Iterator[str]:
        """Ranks whose heartbeats have stopped since the run was started."""
        for path in sorted(self.folder.glob("logs/heartbeats/rank-*.json")):
            own = read_fields(path)
            began, silent_s = own.get("time", 0.0), self.beat["time"] - own.get("time", 0.0)
            if self.held_since is not None and began >= self.held_since and silent_s > PATIENCE_S:
                yield f"rank {own.get('rank')} on {own.get('host')} shows no sign of life for {duration(silent_s)}"

    def slow_parts(self) -> Iterator[str]:
        """What slows the steps of the last report down."""
        ratio = self.values.get("slowest_rank_ratio")
        if ratio is not None and ratio > (self.recipe.get("logging") or {}).get("straggler_factor", math.inf):
            yield f"rank {self.values['slowest_rank']:.0f} takes {ratio:.1f} times as long as the median"
        waiting = self.values.get("data_wait_fraction")
        if waiting is not None and waiting > _MAX_DATA_WAIT:
            yield f"{waiting:.0%} of the time waits for data: raise data.num_workers"

    def incidents(self) -> Iterator[str]:
        """What has files of its own: the newest of each kind."""
        for pattern, what in (
            ("logs/hang-*", "hung"),
            ("logs/bad-step-*.json", "had a bad step"),
            ("checkpoints/damaged-step_*", "found a damaged checkpoint"),
        ):
            if found := sorted(self.folder.glob(pattern)):
                newest = found[-1].relative_to(self.folder)
                yield f"{what} {duration(self.age(str(newest)))} ago: {newest}"


def _is_loss(name: str) -> bool:
    """Whether a metric is a loss of training, or of validation over all sets."""
    return name.removeprefix("validation_") in _LOSSES
