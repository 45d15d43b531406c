"""Pre-trains as megatron_tpt.pretrain (or poisoned_pretrain) does, but the processes that write checkpoints are held.

--hold=4 holds each until the run has reported four steps after that of the checkpoint, --hold=NAME until RUN/NAME is
there; --hold=kill:RANK:STEP kills that rank's writer of that step's checkpoint. Each first leaves its process id in
RUN/writer-RANK-STEP.
"""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_tpt.config.cli import run
from megatron_tpt.training.checkpoint_files import step_number
from megatron_tpt.training.checkpoint_saving import CheckpointSaving

LIMIT_S = 120


def num_reported(run_folder: Path) -> int:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def note_of(saving: CheckpointSaving) -> Path:
    return saving.folder.parents[1] / f"writer-{torch.distributed.get_rank()}-{step_number(saving.folder)}"


def wait(hold: str, saving: CheckpointSaving) -> None:
    """Raises TimeoutError, an OSError, where training seems to wait for the writer."""
    run_folder, rank, step = saving.folder.parents[1], torch.distributed.get_rank(), step_number(saving.folder)
    note_of(saving).write_text(str(os.getpid()))
    if hold.startswith("kill:"):
        if hold == f"kill:{rank}:{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        return
    end = time.monotonic() + LIMIT_S
    while not (num_reported(run_folder) >= step + int(hold) if hold.isdecimal() else (run_folder / hold).exists()):
        if time.monotonic() > end:
            raise TimeoutError(f"nothing happened in {LIMIT_S} s")
        time.sleep(0.01)


def main() -> None:
    argument = next(argument for argument in sys.argv if argument.startswith("--hold="))
    sys.argv.remove(argument)
    poisoned = any(argument.startswith("--poison=") for argument in sys.argv)
    trainer, write, start = os.getpid(), CheckpointSaving._write, CheckpointSaving.write_in_background

    def held_write(saving: CheckpointSaving, staged: list[Any]) -> Any:
        if os.getpid() != trainer:
            wait(argument.removeprefix("--hold="), saving)
        return write(saving, staged)

    def awaited_start(saving: CheckpointSaving) -> None:
        start(saving)
        end = time.monotonic() + LIMIT_S
        while not note_of(saving).exists() and time.monotonic() < end:  # a busy machine lets it begin late
            time.sleep(0.01)

    CheckpointSaving._write, CheckpointSaving.write_in_background = held_write, awaited_start
    try:
        importlib.import_module("poisoned_pretrain" if poisoned else "megatron_tpt.pretrain").main()
    finally:
        CheckpointSaving._write, CheckpointSaving.write_in_background = write, start


if __name__ == "__main__":
    run(main)
