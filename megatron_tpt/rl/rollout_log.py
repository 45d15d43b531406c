"""The rollouts of a run on the disk: what was sampled stays, whenever the run is killed.

    RUN/rollouts/iteration_00000012.waves.jsonl.zst   of the current iteration: a zstd frame for each finished wave
    RUN/rollouts/iteration_00000012.jsonl.zst         a line for each rollout, with all that was computed for it
    RUN/rollouts/iteration_00000012.json              the metrics of the iteration

A wave is appended with one system call and flushed: a crash can only truncate the last frame, which is then removed.
The others appear whole, once everything that depends on the weights at the start of the iteration is in
them: log-probabilities, values, advantages. A run that resumes inside the iteration reads them there.

    RUN/rollouts/recipe.yaml                          the recipe by which the current iteration is sampled
    RUN/rollouts/data.json                            the checksum of the prompts and answers it is sampled from

What the iterations after a checkpoint have sampled is removed when a run resumes from it. On a CPU the same is sampled
again, to the bit; elsewhere the weights may differ by rounding from those that the log is from. What another recipe
has sampled for an iteration that begins, or the same from other data, is removed, too.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import zstandard

from megatron_tpt.config.changes import Change, changes
from megatron_tpt.config.load import read_yaml, to_yaml
from megatron_tpt.config.on_change import Effect
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write, no_links, write_json
from megatron_tpt.json_data import read_json
from megatron_tpt.records import describe, expand_sources, json_lines, read_rows
from megatron_tpt.rl.experience import Sample

if TYPE_CHECKING:
    from megatron_tpt.recipes.rl import RLRecipe

logger = logging.getLogger(__name__)

_NAME = re.compile(r"iteration_(\d{8})\.((waves\.)?jsonl\.zst|json)")


class RolloutLog:
    """The log of a run folder. One process uses it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._recipe_path, self._data_path = folder / "recipe.yaml", folder / "data.json"
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, iteration: int) -> Path:
        """The file of an iteration whose rollouts are all scored."""
        return self.folder / f"iteration_{iteration:08d}.jsonl.zst"

    def waves_path(self, iteration: int) -> Path:
        """The file of an iteration that is being sampled."""
        return self.folder / f"iteration_{iteration:08d}.waves.jsonl.zst"

    def metrics_path(self, iteration: int) -> Path:
        """The file with its metrics."""
        return self.folder / f"iteration_{iteration:08d}.json"

    def begin(self, recipe: "RLRecipe", step: int, data: Mapping[str, str]) -> None:
        """Remove what a run that has done `step` steps samples anew: what later iterations have sampled and, where an
        iteration begins, what another recipe or other data (`Prompts.identity`) have sampled for it."""
        iteration, place = divmod(step, recipe.steps_per_iteration)
        changed = []
        if self._recipe_path.exists():
            changed += [str(one) for one in changes(recipe, read_yaml(self._recipe_path)) if _decides(one)]
        if self._data_path.exists():
            before = read_json(self._data_path)
            changed += [f"the {name} has changed" for name, value in data.items() if before.get(name) != value]
        if changed and not place:
            logger.info(f"iteration {iteration} is sampled from its beginning: {', '.join(changed)}")
        first = iteration if changed and not place else iteration + 1
        for file in self.folder.iterdir():
            match = _NAME.fullmatch(file.name)
            if match is not None and int(match[1]) >= first:
                file.unlink()
        if not place:
            self.note(recipe, data)

    def note(self, recipe: "RLRecipe", data: Mapping[str, str]) -> None:
        """An iteration begins, which this recipe samples from these data."""
        with atomic_write(self._recipe_path) as file:
            file.write_text(to_yaml(recipe))
        write_json(self._data_path, data)

    def read(self, iteration: int) -> tuple[list[Sample], dict[str, float]] | None:
        """The rollouts of an iteration, scored, and its metrics; None where that is not finished."""
        path = self.path(iteration)
        if not path.exists():
            return None
        [source] = expand_sources([path])
        samples = []
        for row in read_rows(source):
            if row.value is None:
                raise UserError(describe(source, row, "remove the file: its iteration is sampled again"))
            samples.append(Sample(**row.value))
        self.waves_path(iteration).unlink(missing_ok=True)  # where the run was killed just before
        return samples, read_json(self.metrics_path(iteration))

    def write(self, iteration: int, samples: Sequence[Sample], metrics: Mapping[str, float]) -> None:
        """The rollouts of an iteration are scored."""
        write_json(self.metrics_path(iteration), metrics)
        with json_lines(self.path(iteration)) as add:
            for one in samples:
                add(json.dumps(one.to_json()).encode())
        self.waves_path(iteration).unlink(missing_ok=True)

    def read_waves(self, iteration: int) -> list[list[Sample]]:
        """The finished waves of an iteration; the remains of one that was interrupted are removed."""
        path = self.waves_path(iteration)
        if not path.exists():
            return []
        content, waves, end = path.read_bytes(), [], 0
        for frame, size in _frames(content):
            waves.append([Sample(**json.loads(line)) for line in frame.splitlines()])
            end += size
        os.truncate(path, end)
        return waves

    def add_wave(self, iteration: int, samples: Sequence[Sample]) -> None:
        """A wave is sampled and graded."""
        lines = b"".join(json.dumps(one.to_json()).encode() + b"\n" for one in samples)
        frame = zstandard.ZstdCompressor(write_checksum=True).compress(lines)
        file = no_links(str(self.waves_path(iteration)), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            if os.write(file, frame) != len(frame):
                raise OSError(f"{self.waves_path(iteration)}: the disk is full")
            os.fsync(file)
        finally:
            os.close(file)


def _decides(change: Change) -> bool:
    """Whether other rollouts, rewards or advantages follow from a change."""
    if change.section in ("data", "rollouts", "rewards", "algorithm", "repro"):
        return change.on_resume is not Effect.FREE
    return change.name in ("run.seed", "training.init_from")


def _frames(content: bytes) -> Iterator[tuple[bytes, int]]:
    """The content and the size of every whole frame."""
    while content:
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        try:
            frame = decompressor.decompress(content)
        except zstandard.ZstdError:
            return
        if not decompressor.eof:
            return
        yield frame, len(content) - len(decompressor.unused_data)
        content = decompressor.unused_data
