"""The arms of the miniature: where each starts, its settings, and how long it is trained.

All arms are trained by the same recipe (heal.yaml) on the same walks, which become longer during the first half of the
steps. An arm has as many tokens as the recurrent one, or as many FLOPs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from house import LENGTHS

from megatron_tpt.config.load import load_recipe
from megatron_tpt.models.sizes import model_flops_per_token
from megatron_tpt.recipes.finetune import FinetuneRecipe

HERE = Path(__file__).resolve().parent
DEPTHS = (1, 2, 4, 8)
"""Iterations at which recurrent arms are measured."""
MEAN_DEPTH = 4
GROWTH = 0.5
"""Part of the steps after which the walks are as long as they become."""
DEEPENING = 0.25
"""Part of the steps after which the mean depth is reached."""
DECAY = 0.3
"""Part of the steps in which the learning rate decays, at the end."""


@dataclass(frozen=True)
class Arm:
    """A way from the parent to a model that takes long walks."""

    name: str
    """In reports."""
    start: Literal["recurrent", "static", "random"]
    """The parent cut and looped; cut only; or a parent that was never trained, cut and looped."""
    budget: Literal["tokens", "FLOPs"] = "tokens"
    """What it has as much of as the recurrent arm."""
    has_curriculum: bool = True
    """Whether the mean depth rises from 1."""
    overrides: tuple[str, ...] = ()
    """Other settings than those of heal.yaml."""

    @property
    def is_recurrent(self) -> bool:
        """Whether it has a depth."""
        return self.start != "static"

    @property
    def folder(self) -> str:
        """The name of its run folder."""
        return self.name.replace(",", "").replace(" ", "_")

    @property
    def depths(self) -> tuple[int, ...]:
        """Iterations at which it is measured."""
        return DEPTHS if self.is_recurrent else (1,)

    def label(self, depth: int) -> str:
        """Its name at a depth, in results."""
        return f"{self.name}, r = {depth}" if self.is_recurrent else self.name

    def settings(self, num_steps: int) -> list[str]:
        """Its part of the command line, when it is trained for `num_steps` steps."""
        settings = [f"--optimizer.decay_steps={num_steps}", f"--optimizer.wsd_decay_steps={round(DECAY * num_steps)}"]
        if self.is_recurrent:
            settings += [f"--model.mean_recurrences={MEAN_DEPTH}", f"--model.backprop_recurrences={MEAN_DEPTH}"]
            if self.has_curriculum:
                rising = round(DEEPENING * num_steps)
                settings += ["--model.depth_curriculum=1-sqrt", f"--model.depth_curriculum_steps={rising}"]
        return [*settings, *self.overrides]


RECURRENT, STATIC = Arm("recurrent", "recurrent"), Arm("static", "static")
STATIC_FLOPS = Arm("static, equal FLOPs", "static", "FLOPs")
NO_CURRICULUM = Arm("recurrent, no depth curriculum, equal FLOPs", "recurrent", "FLOPs", has_curriculum=False)
UNTRAINED = Arm("recurrent, random parent", "random")
ADAMW = Arm(
    "recurrent, AdamW",
    "recurrent",
    overrides=(
        "--optimizer.name=adam",
        "--optimizer.learning_rate=3.0e-3",
        "--optimizer.min_learning_rate=3.0e-6",
        "--optimizer.adam_learning_rate=null",
    ),
)
MAIN_ARMS = (RECURRENT, STATIC)
ALL_ARMS = (RECURRENT, STATIC, STATIC_FLOPS, NO_CURRICULUM, UNTRAINED, ADAMW)


def stages(num_steps: int) -> dict[int, int]:
    """Doors of the longest walk -> the step until which walks are at most so long."""
    ends = [round(GROWTH * num_steps * place / (len(LENGTHS) - 1)) for place in range(1, len(LENGTHS))]
    return dict(zip(LENGTHS, [*ends, num_steps], strict=True))


def expected_flops(arm: Arm, num_steps: int, start: Path) -> float:
    """Training FLOPs of an arm that starts from this checkpoint, before its depths are drawn."""
    words = [str(HERE / "heal.yaml"), f"--training.init_from={start}", *arm.settings(num_steps)]
    recipe, _ = load_recipe(FinetuneRecipe, words)
    return _flops(recipe, recipe.model.expected_passes(num_steps)) * num_steps


def planned_steps(arm: Arm, num_steps: int, starts: Mapping[str, Path]) -> int:
    """Steps of an arm, when the recurrent one is trained for `num_steps`."""
    if arm.budget == "tokens":
        return num_steps
    budget = expected_flops(RECURRENT, num_steps, starts[RECURRENT.start])
    return round(num_steps * budget / expected_flops(arm, num_steps, starts[arm.start]))


def measured_costs(run_folder: Path) -> dict[str, int | float]:
    """Steps, tokens and training FLOPs of a finished arm, at the depths that were drawn."""
    recipe, _ = load_recipe(FinetuneRecipe, [str(run_folder / "run.yaml")])
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, recipe.training.num_steps + 1)), run_folder
    names = [name for name in ("depth", "depth_backprop") if name in rows[0]]
    passes = recipe.model.passes({name: fmean(row[name] for row in rows) for name in names})
    return {"steps": len(rows), "tokens": rows[-1]["tokens"], "flops": _flops(recipe, passes) * len(rows)}


def _flops(recipe: FinetuneRecipe, passes: Mapping[str, float]) -> float:
    """Of a step in which every token makes `passes` passes."""
    num_tokens = recipe.training.global_batch_size * recipe.training.sequence_length
    return num_tokens * model_flops_per_token(recipe.model, recipe.training.sequence_length, passes)
