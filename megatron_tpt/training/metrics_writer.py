"""metrics.jsonl, and what else metrics are sent to."""

import contextlib
import json
import logging
import math
import os

from megatron_tpt import platform
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.files import atomic_write
from megatron_tpt.training.metric_sinks import open_sinks

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes metrics to `metrics.jsonl` and to the recipe's sinks (metric_sinks.py). Only the first rank writes.

    After a resume, lines of steps beyond the checkpoint are removed: those steps are repeated.
    """

    def __init__(self, recipe: Recipe, resumed_step: int) -> None:
        self.enabled = platform.is_first_rank()
        if not self.enabled:
            return
        path = recipe.run.output_dir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _is_until(line, resumed_step)]
            with atomic_write(path) as temporary:
                temporary.write_text("".join(kept))
        self.file = path.open("ab", buffering=0)
        self.unwritten = b""
        self.is_full = False
        self.sinks = list(open_sinks(recipe, resumed_step))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record the metrics of a step. If the disk is full, the lines are written by a later call.

        JSON has no NaN and no infinity: non-finite values are `null` in metrics.jsonl, and are omitted elsewhere.
        """
        if not self.enabled:
            return
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": step, **{name: finite.get(name) for name in values}}
        self.unwritten += json.dumps(line, allow_nan=False).encode() + b"\n"
        self._write_lines()
        for sink in self.sinks:
            sink.write(step, finite)

    def _write_lines(self) -> None:
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            self.is_full = False
        except OSError as error:
            if not self.is_full:
                logger.warning(f"{self.file.name} cannot be written ({error.strerror}): will be retried")
            self.is_full = True

    def sync(self) -> None:
        """Flush to disk: a checkpoint must not be ahead of its metrics."""
        if self.enabled:
            self._write_lines()
            with contextlib.suppress(OSError):  # a full disk: saving the checkpoint then fails with a message
                os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the files."""
        if self.enabled:
            self._write_lines()
            self.file.close()
            for sink in self.sinks:
                sink.close()


def _is_until(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except ValueError:  # the line that a killed run was writing
        return False
