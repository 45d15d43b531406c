"""Check that both layouts of mid-training have the same losses, and write what came out as a table.

python examples/smollm2/report.py --output OUTPUT_DIR
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tpt import markdown
from megatron_tpt.config.cli import parse, run
from megatron_tpt.errors import Fault
from megatron_tpt.evaluation.report import accuracy_cell
from megatron_tpt.files import atomic_write
from megatron_tpt.json_data import read_object
from megatron_tpt.logs import print_result
from megatron_tpt.records import expand_sources, read_rows

TOLERANCE = 1e-4
"""Of losses in float32 between layouts, relative: sums are taken in another order."""


@dataclass(frozen=True)
class ReportOptions:
    """What to report."""

    output: Path
    """The folder that run.sh has written."""


def losses(run_folder: Path) -> list[float]:
    """The loss of every step."""
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def check_losses(tensor: list[float], pipeline: list[float]) -> float:
    """The largest relative difference. Raises Fault when the layouts do not have the same losses."""
    if len(tensor) != len(pipeline) or not tensor:
        raise Fault(f"{len(tensor)} losses with tensor and {len(pipeline)} with pipeline parallelism")
    worst = max(abs(a - b) / abs(b) for a, b in zip(tensor, pipeline, strict=True))
    if not worst <= TOLERANCE:
        raise Fault(f"the losses of the two layouts differ by {worst:.2e} of their value; {TOLERANCE:g} is allowed")
    return worst


def evaluation(results: dict[str, Any]) -> list[str]:
    """The cells of one evaluation."""
    [result] = results["models"]
    num_samples = result["num_problems"] * result["num_samples"]
    return [
        accuracy_cell(result), str(result["num_problems"]), f"{100 * result['extraction_failures'] / num_samples:.0f}%",
        f"{100 * result['truncated_fraction']:.0f}%", f"{result['mean_output_tokens']:.0f}",
    ]  # fmt: skip


def as_markdown(output: Path) -> str:
    """The page."""
    tensor, pipeline = (losses(output / f"mid-{layout}") for layout in ("tensor", "pipeline"))
    worst = check_losses(tensor, pipeline)
    tuned = losses(output / "finetune")
    before, after = (read_object(output / name / "results.json") for name in ("before", "after"))
    thoughts = [row.value for source in expand_sources([output / "thought"]) for row in read_rows(source) if row.value]
    num_characters = sum(len(one["thinking"]) for one in thoughts)
    environment, engine = after["environment"], after["engine"]
    seconds = {path.name.removeprefix("seconds-"): int(path.read_text()) for path in output.glob("seconds-*")}
    assert all(map(math.isfinite, tuned))
    rows = [["before", *evaluation(before)], ["after", *evaluation(after)]]
    versions = ", ".join(f"{name} {version}" for name, version in engine["versions"].items())
    hardware = environment["hardware"]
    return "\n".join(
        [
            markdown.table(["GSM8K", "accuracy [95%]", "problems", "no answer", "truncated", "tokens"], rows),
            "",
            f"- thinking: {len(thoughts):,} documents kept, {num_characters:,} characters",
            f"- mid-training: loss {tensor[0]:.4f} to {tensor[-1]:.4f} in {len(tensor)} steps; tensor against pipeline "
            f"parallelism: largest relative difference {worst:.1e}",
            f"- fine-tuning: loss {tuned[0]:.4f} to {tuned[-1]:.4f} in {len(tuned)} steps",
            f"- seconds: {', '.join(f'{name} {value:,}' for name, value in sorted(seconds.items()))}; "
            f"together {sum(seconds.values()):,}",
            f"- {hardware['processor']}, {hardware['cores']} cores; {versions}; "
            f"revision {environment['package']['git_revision'] or 'unknown'}",
            "",
        ]
    )


def main() -> None:
    options = parse(ReportOptions, description=__doc__)
    page = as_markdown(options.output)
    with atomic_write(options.output / "table.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    print_result(page, end="")


if __name__ == "__main__":
    run(main)
