"""What a step took, where its output says it; a step that says nothing loads nothing for it."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.json_data import read_json


def measured(command: Sequence[str], output: Path, place: str | None) -> dict[str, float | None]:
    """What a command that has succeeded took, where its output says it: tokens and FLOPs of a training program, tokens
    and prompt_tokens of tools/augment.py. `place` is Cost.measured_tokens.

    FLOPs of a recurrent model are those at the mean of the depths that were logged. Of reinforcement learning also
    generated_tokens, those of all rollouts, whose FLOPs are added.
    """
    if place is not None:
        name, _, keys = place.partition(":")
        return {"tokens": number_at(read_json(output / name), keys, output / name)}
    if (ledgers := output / ".work/ledger").is_dir():
        from megatron_tpt.thinking.ledger import latest_entries
        from megatron_tpt.thinking.statistics import ThinkingStatistics

        written = ThinkingStatistics()
        for entry in latest_entries(ledgers):
            written.merge(entry.statistics)
        return {"tokens": written.thinking_tokens.total, "prompt_tokens": written.prompt_tokens, "generated": True}
    if (training := training_of(command)) is None:
        return {}
    folders = [word.partition("=")[2] for word in training[1] if word.startswith("--run.output_dir=")]
    if not folders or not (run := Path(folders[-1])).joinpath("run.yaml").is_file():
        return {}
    from megatron_tpt.config.load import load_recipe
    from megatron_tpt.models.sizes import model_flops_per_token

    recipe, _ = load_recipe(training[0], [str(run / "run.yaml")])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    iterations = [row for row in rows if "rollouts" in row]
    if not (rows := [row for row in rows if "tokens" in row]):
        return {}
    depths = {
        name: statistics.fmean(row[name] for row in rows) for name in ("depth", "depth_backprop") if name in rows[0]
    }
    passes = recipe.model.passes(depths) if depths else None
    tokens = float(rows[-1]["tokens"])
    flops_per_token = model_flops_per_token(recipe.model, recipe.training.sequence_length, passes)
    found: dict[str, float | None] = {"tokens": tokens, "flops": tokens * flops_per_token}
    if iterations:
        sampled = sum(row["rollouts"] * row["response_tokens"] for row in iterations)
        found |= {"generated_tokens": sampled, "flops": tokens * flops_per_token + sampled * flops_per_token / 3}
    return found


def value_at(content: Any, keys: str, path: Path) -> Any:
    """What is at KEY.KEY of a JSON value, with numbers for the places of lists; everything for "".

    Raises UserError, naming the file, where nothing is.
    """
    value = content
    for key in keys.split(".") if keys else []:
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise UserError(f"{path}: has nothing at {keys}; correct the study, or what wrote the file") from None
    return value


def number_at(content: Any, keys: str, path: Path) -> float:
    """The finite number that is there; raises UserError for anything else."""
    value = value_at(content, keys, path)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: {keys} is {value!r}, and a number is due")
    return float(value)


def training_of(command: Sequence[str]) -> tuple[Any, list[str]] | None:
    """The kind of recipe that a command trains, and the arguments of its program."""
    if not any(word.startswith("megatron_tpt.") for word in command):
        return None
    from megatron_tpt.recipes import recipe_types  # takes time to load, and most steps train nothing

    for kind in recipe_types():
        module = f"megatron_tpt.{kind.program}"
        if module in command:
            return kind, list(command[command.index(module) + 1 :])
    return None
