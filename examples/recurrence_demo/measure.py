"""Greedy answers of trained checkpoints to the problems, at several depths.

python examples/recurrence_demo/measure.py --checkpoints DIR ... --problems FILE --output FOLDER

A problem is solved when the response is the most likely token after the prompt. Writes FOLDER/accuracy.json. One
process; any checkpoint of this example.
"""

import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.fields import PositiveInt
from megatron_tpt.config.load import read_yaml, recipe_from_dict
from megatron_tpt.files import real_path, write_json
from megatron_tpt.models.recurrent.config import RecurrentConfig
from megatron_tpt.recipes.finetune import FinetuneRecipe

if TYPE_CHECKING:  # these import torch
    import torch

    from megatron_tpt.objectives.objective import MicroBatch, Needs
    from megatron_tpt.training.data import ValidationLoader
    from megatron_tpt.training.model import Model


@dataclass(frozen=True)
class MeasureOptions:
    """What to measure, on which problems."""

    checkpoints: list[Path]
    """Checkpoint folders, such as RUN/checkpoints/latest."""
    problems: Path
    """JSON lines with prompt and response, as house.py writes them."""
    output: Path
    """The folder for accuracy.json."""
    recurrences: list[PositiveInt] = field(default_factory=lambda: [1, 2, 4, 8])
    """Depths of recurrent models; others are measured once."""
    longest: PositiveInt = 6
    """Doors of the longest walks."""


class SolvedProblems:
    """Counts problems and solved ones by their number of doors: an objective that is only evaluated.

    The responses are one token; the end-of-sequence token that follows does not count, since no walk of the training
    data ends with it. One tensor-parallel rank.
    """

    needs: "Needs" = "logits"

    def __init__(self, longest: int) -> None:
        self.longest = longest
        counts = [f"{kind}/{num_doors}" for kind in ("solved", "asked") for num_doors in range(1, longest + 1)]
        self.sum_names = ("loss", "tokens", *counts)

    def __call__(self, outputs: "torch.Tensor", batch: "MicroBatch") -> "tuple[torch.Tensor, dict[str, torch.Tensor]]":
        """Logits [b, s, v] and a micro-batch [b, s] -> the summed cross-entropy of the responses, and the counts."""
        import torch

        labels, learned = batch["labels"], batch["loss_mask"] > 0
        # The first learned label of an example: at place n, that of the last of n doors (at 0 there is the room).
        asked = learned.clone()
        asked[:, 1:] &= ~learned[:, :-1]
        loss = torch.nn.functional.cross_entropy(outputs[asked].float(), labels[asked], reduction="sum")
        solved = asked & (outputs.argmax(dim=-1) == labels)
        doors = (batch["position_ids"][each] for each in (solved, asked))
        counts = [torch.bincount(each, minlength=self.longest + 1)[1:].double() for each in doors]
        sums = [loss[None].double(), asked.sum()[None].double(), *counts]
        return loss, dict(zip(self.sum_names, torch.cat(sums), strict=True))

    def metrics(self, sums: Any) -> dict[str, float]:
        """The share of solved problems, by the number of doors for which there are any, and together."""
        asked = {doors: sums[f"asked/{doors}"] for doors in range(1, self.longest + 1) if sums[f"asked/{doors}"]}
        solved = {doors: sums[f"solved/{doors}"] for doors in asked}
        shares = {str(doors): solved[doors] / asked[doors] for doors in asked}
        return {"loss": sums["loss"] / sums["tokens"], "all": sum(solved.values()) / sum(asked.values()), **shares}


def recipe_for(checkpoint: Path, options: MeasureOptions) -> FinetuneRecipe:
    """The recipe of a checkpoint, with the problems as its data."""
    saved = read_yaml(checkpoint / "recipe.yaml")
    problems = str(options.problems.resolve())
    training = {**saved["training"], "init_from": None, "num_steps": 1, "validation_interval": 1}
    data = {"train": [problems], "validation": [problems], "tokenizer": str(checkpoint / "tokenizer")}
    own = {**saved["run"], "output_dir": str(options.output.resolve())}
    return recipe_from_dict(FinetuneRecipe, {**saved, "training": training, "data": data, "run": own})


def accuracy(model: "Model", loader: "ValidationLoader", recipe: FinetuneRecipe, options: MeasureOptions) -> Any:
    """Depth -> the metrics of SolvedProblems."""
    import torch

    from megatron_tpt.training.batches import take_batch

    objective = SolvedProblems(options.longest)
    configs = {"1": recipe.model}
    if isinstance(recipe.model, RecurrentConfig):
        configs = {str(r): dataclasses.replace(recipe.model, test_recurrences=r) for r in options.recurrences}
    results = {}
    for depth, config in configs.items():
        with contextlib.closing(loader.iterate(0, loader.num_steps)) as microbatches:
            steps = range(loader.num_steps)
            batches = (take_batch(loader, microbatches, step, 0, config, training=False) for step in steps)
            sums = torch.stack([model.evaluate(batch, objective) for batch in batches]).sum(dim=0)
        results[depth] = objective.metrics(dict(zip(objective.sum_names, sums.tolist(), strict=True)))
    return results


def measure(options: MeasureOptions) -> None:
    """Measure all checkpoints, one after the other, and write the results in their order."""
    recipes = {path: recipe_for(real_path(path), options) for path in options.checkpoints}
    from megatron_tpt import platform
    from megatron_tpt.training.builder import build_frozen_model
    from megatron_tpt.training.launch import distributed

    results = []
    with distributed(next(iter(recipes.values()))):
        platform.seed_everything(0)
        for path, recipe in recipes.items():
            [loader] = recipe.build_data().validation.values()
            model = build_frozen_model(recipe, real_path(path))
            results.append({"checkpoint": str(path), "accuracy": accuracy(model, loader, recipe, options)})
    write_json(options.output / "accuracy.json", {"problems": str(options.problems), "results": results})


if __name__ == "__main__":
    run(lambda: measure(parse(MeasureOptions, description=__doc__)))
