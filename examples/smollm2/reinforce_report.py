"""Write what reinforce.sh has measured as a page of tables.

python examples/smollm2/reinforce_report.py --output OUTPUT_DIR
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt import markdown
from megatron_tpt.config.cli import parse, run
from megatron_tpt.files import atomic_write
from megatron_tpt.json_data import read_object
from megatron_tpt.logs import print_result

METRICS = {
    "accuracy": "accuracy", "reward": "reward", "response_tokens": "tokens", "truncated": "truncated",
    "rollout_entropy": "entropy", "mismatch/gap_max": "largest gap of engine and trainer", "repro/L_first": "L first",
    "repro/L_half": "L half", "repro/L_last": "L last", "repro/segments": "segments",
    "seconds/generation": "generation, s", "seconds/log_probabilities": "log-probabilities, s",
    "seconds/process": "REPRO, s", "seconds/weights": "weights, s",
}  # fmt: skip
"""Of an iteration, and how they are called here."""


@dataclass(frozen=True)
class ReportOptions:
    """What to report."""

    output: Path
    """The folder that reinforce.sh has written."""


def as_markdown(output: Path) -> str:
    """The page."""
    curves = read_object(output / "process_rewards.json")
    texts = [
        [kind, *(f"{one[name]:.2f}" for name in ("first", "middle", "before_last", "last"))]
        for kind, one in curves["means"].items()
    ]
    directions = [
        [one["expected"], f"{one['mean']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]", one["verdict"]]
        for one in curves["directions"]
    ]
    lines = [json.loads(line) for line in (output / "reinforce/metrics.jsonl").read_text().splitlines()]
    iterations = [line for line in lines if "reward" in line]
    steps = [line for line in lines if "loss" in line]
    return "\n".join(
        [
            f"L in nats per token of the answer, means over {curves['problems']} problems, after parts of a text:",
            "",
            markdown.table(["text", "nothing", "half of it", "all but its last segment", "all of it"], texts),
            "",
            "Paired differences with 95% intervals (Student's t over the problems), against what is expected of a "
            "model that reasons well:",
            "",
            markdown.table(["expected", "difference", "verdict"], directions),
            "",
            markdown.table(
                ["iteration", *(str(number) for number in range(len(iterations)))],
                [[title, *(f"{line[name]:.4g}" for line in iterations)] for name, title in METRICS.items()],
            ),
            "",
            markdown.table(
                ["step", "loss", "gradient norm", "KL of the update", "seconds"],
                [
                    [f"{one['step']}", *(f"{one[name]:.4g}" for name in ("loss", "grad_norm", "update_kl", "step_s"))]
                    for one in steps
                ],
            ),
            "",
        ]
    )


def main() -> None:
    options = parse(ReportOptions, description=__doc__)
    page = as_markdown(options.output)
    with atomic_write(options.output / "reinforce.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    print_result(page, end="")


if __name__ == "__main__":
    run(main)
