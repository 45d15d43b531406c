"""Folders of runs as their processes leave them, at a time of the test's choice."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NOW = 1_800_000_000.0


def write(path: Path, content: Any, age_s: float = 0.0) -> Path:
    """Write JSON (a list: one value on a line), last modified `age_s` before NOW."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = content if isinstance(content, list) else [content]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(path, (NOW - age_s, NOW - age_s))
    return path


def heartbeat(folder: Path, *, age_s: float = 5.0, phase: str = "forward", rank: int = 0, **fields: Any) -> None:
    """That of a rank; of the first one also the file of the run."""
    beat = {"rank": rank, "host": f"node{rank}", "pid": 1, "time": NOW - age_s, "step": 40, "num_steps": 100}
    beat |= {"phase": phase, "waits": False, "where": ""} | fields
    write(folder / f"logs/heartbeats/rank-{rank:05d}.json", beat, age_s)
    if rank == 0:
        write(folder / "heartbeat.json", beat, age_s)


def lock(folder: Path, *, since_s: float = 3600.0, age_s: float = 3.0) -> None:
    """The lock of a process that has held the folder for `since_s`, and last showed a sign of life `age_s` ago."""
    since = datetime.fromtimestamp(NOW - since_s, UTC).isoformat(timespec="seconds")
    write(folder / "run.lock", {"host": "node0", "pid": 1, "since": since}, age_s)


def metrics(folder: Path, *lines: dict[str, Any], age_s: float = 30.0) -> None:
    write(folder / "metrics.jsonl", list(lines), age_s)


def checkpoint(folder: Path, step: int, *, age_s: float = 600.0) -> Path:
    path = folder / f"checkpoints/step_{step:08d}"
    write(path / "checksums.json", {})
    os.utime(path, (NOW - age_s, NOW - age_s))
    return path


def running(folder: Path) -> Path:
    """A run in its 41st of 100 steps."""
    heartbeat(folder)
    lock(folder)
    report = {"loss": 2.5, "loss_document": 2.75, "loss_thinking": 2.25, "tokens": 81920, "tokens_per_s": 1234.5}
    report |= {"mfu": 0.415, "remaining_s": 630.0, "data_wait_fraction": 0.01, "slowest_rank": 0}
    metrics(folder, {"step": 30, "validation_loss": 2.6}, {"step": 40, **report, "slowest_rank_ratio": 1.1})
    checkpoint(folder, 20, age_s=1200)
    checkpoint(folder, 40)
    (folder / "run.yaml").write_text("logging: {straggler_factor: 1.5}\ntraining: {num_steps: 100}\n")
    return folder
