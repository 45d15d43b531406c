"""Evaluate the checkpoints of a training run, while it trains or afterwards, into its TensorBoard.

OUTPUT/step_00001000/          results.json, report.md and all else of one checkpoint
OUTPUT/models/step_00001000/   its export, while it is evaluated
RUN/tensorboard/evaluation/    accuracies and perplexities by step, a run of their own beside that of training

The same command resumes: a checkpoint that has its results is not evaluated again.
"""

import dataclasses
import itertools
import logging
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_tpt.config.load import read_yaml
from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.evaluate import evaluate
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.interop.hf_export import export_hf
from megatron_tpt.interop.options import ExportOptions
from megatron_tpt.json_data import read_object
from megatron_tpt.names import shown
from megatron_tpt.training.checkpoint_files import finished_checkpoints, step_number

logger = logging.getLogger(__name__)

_POLL_S = 10.0
_STEP = re.compile(r"step_(\d+)")
_FIGURES = {
    "models": ("accuracy", "stderr", "truncated_fraction", "extraction_failures", "mean_output_tokens"),
    "documents": ("perplexity", "bits_per_byte"),
}


def evaluate_checkpoints(runs: Sequence[EvaluateOptions]) -> None:
    """Do what `tools/evaluate.py --run` does. Raises UserError for what the user can fix."""
    first = runs[0]
    assert first.run is not None
    if not (first.run / "run.yaml").is_file():
        raise UserError(f"{first.run}: not the folder of a training run (no run.yaml)")
    with _Board(first.run / "tensorboard" / "evaluation", first.output) as board:
        for checkpoint in _checkpoints(first.run, follow=first.follow):
            output = first.output / checkpoint.name
            if not _is_done(output) and (model := _exported(checkpoint, first.output / "models")) is not None:
                own: dict[str, Any] = {"run": None, "follow": False, "model": [str(model)], "output": output}
                evaluate([dataclasses.replace(run, **own) for run in runs])
                shutil.rmtree(model)
            board.add(output)


def _checkpoints(run: Path, *, follow: bool) -> Iterator[Path]:
    """The complete checkpoints of a run, oldest first; with `follow` also those to come, up to the last step's."""
    seen: set[Path] = set()
    last_step = int(read_yaml(run / "run.yaml")["training"]["num_steps"])
    while True:
        new = [
            path
            for path in finished_checkpoints(run / "checkpoints")
            if path not in seen and _STEP.fullmatch(path.name)
        ]
        if new:
            seen.add(new[0])
            yield new[0]
        elif not follow or any(step_number(path) >= last_step for path in seen):
            break
        else:
            time.sleep(_POLL_S)
    if not seen:
        raise UserError(f"{run}: has no checkpoints yet; give --follow to wait for them")


def _exported(checkpoint: Path, models: Path) -> Path | None:
    """The Hugging Face folder of a checkpoint; None where training has deleted the checkpoint meanwhile."""
    model = models / checkpoint.name
    if model.is_dir():  # of a run that was stopped: exports are written whole or not at all
        return model
    try:
        export_hf(ExportOptions(checkpoint, model))
    except Exception:  # whatever reading half a checkpoint gives
        if checkpoint.is_dir():
            raise
        logger.warning(
            f"{shown(checkpoint)} was deleted before it could be exported; keep more checkpoints (checkpoint.keep_last)"
        )
        return None
    return model


def _results(output: Path) -> dict[str, Any] | None:
    path = output / "results.json"
    return read_object(path) if path.is_file() else None


def _is_done(output: Path) -> bool:
    """Whether a checkpoint is evaluated, and no request has failed."""
    results = _results(output)
    return results is not None and not any(each["failed_requests"] for part in _FIGURES for each in results[part])


class _Board:
    """Writes figures for TensorBoard; use it as a context manager. What an earlier command wrote is written anew, from
    the results, so that no step is there twice."""

    def __init__(self, folder: Path, output: Path) -> None:
        self._folder = folder
        self._output = output
        self._written: set[Path] = set()

    def __enter__(self) -> "_Board":
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(self._folder, ignore_errors=True)
        self._writer = SummaryWriter(str(self._folder))
        for output in sorted(self._output.glob("step_*")):
            self.add(output)
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def add(self, output: Path) -> None:
        """Write the figures of the checkpoint whose results are in `output`, where there are any."""
        results = _results(output)
        if results is None or output in self._written:
            return
        self._written.add(output)
        for part, names in _FIGURES.items():
            for result, name in itertools.product(results[part], names):
                if result[name] is not None:
                    depth = "" if result["recurrences"] is None else f"/r{result['recurrences']}"
                    self._writer.add_scalar(f"{result['benchmark']}{depth}/{name}", result[name], step_number(output))
        self._writer.flush()
