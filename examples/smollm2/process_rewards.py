"""REPRO's L along texts of which we know what they are worth: does it fall along worked solutions of GSM8K?

python examples/smollm2/process_rewards.py --data DATA_DIR --model OUTPUT/model --checkpoint OUTPUT/imported \\
    --output OUTPUT/process_rewards.json

L is the model's loss on the right answer after a part of the text, here after each of its segments: the steps of the
solution; the same steps in another order; the sentences of the problem again. OUTPUT is that of reinforce.sh.
"""

import json
import random
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from prepare import PROMPT, chat, number_of

from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.files import write_json
from megatron_tpt.recipes.rl import RLRecipe


@dataclass(frozen=True)
class CurveOptions:
    """What to score."""

    data: Path
    """The folder with gsm8k_train.jsonl."""
    model: Path
    """The model as a Hugging Face folder: its tokenizer and chat template are used."""
    checkpoint: Path
    """The same model, imported (tools/import_hf.py)."""
    output: Path
    """Where the figures go, .json."""
    num_problems: Annotated[int, Ge(2)] = 20
    """Take the first N problems with at least three steps."""


def texts_of(question: str, worked: str, seed: int) -> dict[str, list[str]]:
    """The segments of each kind of text."""
    solution, _, _ = chat(question, worked)["messages"][1]["content"].rpartition("\n\n")  # without "The answer is"
    steps = solution.split("\n")
    shuffled = steps
    while shuffled == steps:
        shuffled = random.Random(seed).sample(steps, len(steps))
        seed += 1
    return {"solution": steps, "shuffled": shuffled, "problem again": re.split(r"(?<=[.?!])\s+", question.strip())}


def score(options: CurveOptions, rows: Sequence[Mapping[str, str]]) -> dict[str, list[list[float]]]:
    """For every kind of text the curves L of all problems, in nats per token of the answer."""
    import torch

    from megatron_tpt import platform
    from megatron_tpt.generation import load_tokenizer, render_chat
    from megatron_tpt.rl.experience import Experience, Sample
    from megatron_tpt.rl.rows import Packer
    from megatron_tpt.rl.scoring import ProcessScorer, Scorer
    from megatron_tpt.training.builder import build_frozen_model
    from megatron_tpt.training.launch import distributed

    tokenizer = load_tokenizer(str(options.model))
    samples: dict[str, list[Sample]] = {}
    for position, row in enumerate(rows):
        prompt = render_chat(tokenizer, [{"role": "user", "content": PROMPT.replace("{question}", row["question"])}])
        for kind, segments in texts_of(row["question"], row["answer"], seed=position).items():
            text = "\n\n".join(segments)
            prompt_ids, ids = (tokenizer(one, add_special_tokens=False).input_ids for one in (prompt, text))
            answer = number_of(row["answer"])
            own = Sample(position, 0, str(position), prompt, prompt_ids, text, ids, [0.0] * len(ids), 0, True, answer,
                         None, {"correct": 1.0})  # fmt: skip
            samples.setdefault(kind, []).append(own)
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(options.checkpoint, Path(folder))
        with distributed(recipe):
            platform.seed_everything(recipe.run.seed)
            scorer = Scorer(Packer(recipe), recipe.vocab_size, sequences_at_once=8)
            process = ProcessScorer(scorer, recipe.repro, tokenizer)
            model, curves = build_frozen_model(recipe, recipe.start), {}
            for kind, own in samples.items():
                experience = Experience.collected(own)
                experience.columns["entropy"] = torch.zeros(experience.mask.shape)
                curves[kind] = [one.answer_losses for one in process(model, experience).samples]
    return curves


def recipe_of(checkpoint: Path, folder: Path) -> RLRecipe:
    """All segments count; the answer follows in words, of which the number alone is scored."""
    raw: dict[str, Any] = {
        "run": {"output_dir": str(folder)},
        "training": {
            "init_from": str(checkpoint), "num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1,
            "sequence_length": 768, "dtype": "float32",
        },
        "repro": {"enabled": True, "num_segments": 64, "answer_prefix": "\n\nThe answer is $\\boxed{",
                  "answer_template": "{}"},
    }  # fmt: skip
    recipe = recipe_from_dict(RLRecipe, raw).resolve()
    assert isinstance(recipe, RLRecipe)
    return recipe.with_vocabulary(recipe.tokenizer())


def means(curves: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict[str, float]]:
    """L over the problems: before a text, in the middle of its segments, before the last one, and after it."""
    return {
        kind: {
            "first": statistics.mean(curve[0] for curve in own),
            "middle": statistics.mean(curve[len(curve) // 2] for curve in own),
            "before_last": statistics.mean(curve[-2] for curve in own),
            "last": statistics.mean(curve[-1] for curve in own),
        }
        for kind, own in curves.items()
    }


def directions(curves: Mapping[str, Sequence[Sequence[float]]]) -> list[dict[str, object]]:
    """What is expected of a model that reasons well: differences of L that are below 0, paired by problem, with 95%
    intervals (Student's t)."""
    from scipy import stats

    solution, shuffled, again = (curves[kind] for kind in ("solution", "shuffled", "problem again"))
    pairs = {
        "a solution lowers L": [curve[-1] - curve[0] for curve in solution],
        "a solution lowers it more than the problem again": [
            one[-1] - two[-1] for one, two in zip(solution, again, strict=True)
        ],
        "a solution lowers it more in order than in another": [
            one[-1] - two[-1] for one, two in zip(solution, shuffled, strict=True)
        ],
        "a solution lowers it before its last step, which has the answer in it": [
            curve[-2] - curve[0] for curve in solution
        ],
        "the problem again lowers it": [curve[-1] - curve[0] for curve in again],
    }
    found: list[dict[str, object]] = []
    for expected, differences in pairs.items():
        interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        mean, low, high = statistics.mean(differences), float(interval.low), float(interval.high)
        verdict = "holds" if high < 0 else "does not hold" if low > 0 else "not decided"
        found.append({"expected": expected, "mean": mean, "low": low, "high": high, "verdict": verdict})
    return found


def main() -> None:
    """Score, and write the figures."""
    options = parse(CurveOptions, description=__doc__)
    with (options.data / "gsm8k_train.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["answer"].count("\n") >= 3][: options.num_problems]
    curves = score(options, rows)
    write_json(
        options.output,
        {"problems": len(rows), "means": means(curves), "directions": directions(curves), "curves": curves},
        indent=1,
    )


if __name__ == "__main__":
    run(main)
