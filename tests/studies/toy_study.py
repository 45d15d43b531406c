"""A study of 2 x 2 arms x 2 seeds over toy_step.py, and what it left behind."""

import csv
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_tpt.studies.options import StudyOptions
from megatron_tpt.studies.run import run_study

STEP = Path(__file__).with_name("toy_step.py")
TOOL = Path(__file__).resolve().parents[2] / "tools/study.py"


@dataclass(frozen=True)
class Toy:
    """The study in a folder. `notes` say which steps have begun, each time that they did."""

    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "runs"

    def content(self) -> dict[str, Any]:
        """The study's file: two pretraining arms, each with two fine-tunings, two seeds."""
        return {
            "title": "Toys",
            "factors": {
                "pre": {"plain": {"value": "p"}, "thought": {"value": "t"}},
                "sft": {"short": {"value": "s"}, "long": {"value": "l"}},
                "seed": [0, 1],
            },
            "steps": {
                "train": {
                    "command": [str(STEP), "train", "{output}", "--value", "{pre.value}{seed}"],
                    "cost": {"tokens": 1000, "flops": "6 * 10 * tokens", "hours": 0.5},
                },
                "tune": {
                    "command": [str(STEP), "tune", "{output}", "--from", "{train}", "--value", "{sft.value}"],
                    "cost": {"tokens": 200, "flops": "6 * 10 * tokens", "hours": 0.25},
                    "results": {"file": "result.json", "metrics": {"score": "score"}, "trials": {"score": "problems"}},
                },
            },
            "report": {"chance": {"score": 0.5}},
        }

    def small(self) -> dict[str, Any]:
        """The study with one pretraining arm and one seed: a step, and the two that need it."""
        content = self.content()
        content["factors"] |= {"pre": {"plain": {"value": "p"}}, "seed": [0]}
        return content

    def write(self, content: dict[str, Any] | None = None) -> Path:
        path = self.folder / "study.yaml"
        path.write_text(yaml.safe_dump(self.content() if content is None else content, sort_keys=False))
        return path

    def run(self, **options: Any) -> None:
        """Run the study in this process."""
        run_study(StudyOptions(self.folder / "study.yaml", self.output, **options))

    def start(self, *options: str) -> "subprocess.Popen[str]":
        """Run the study in a process of its own."""
        command = [sys.executable, str(TOOL), str(self.folder / "study.yaml"), "--output", str(self.output), *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def notes(self) -> list[tuple[str, int]]:
        """What has begun since they were read last, with its process."""
        path = self.folder / "notes.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(name, int(process)) for name, process in map(str.split, lines)]

    def new_starts(self) -> Counter[str]:
        """The steps that have begun since the last call: how often each."""
        names = Counter(name for name, _ in self.notes())
        (self.folder / "notes.txt").unlink(missing_ok=True)
        return names

    def values(self) -> dict[tuple[str, ...], float]:
        """The figures of the report by levels."""
        with (self.output / "report/results.csv").open() as file:
            return {(row["pre"], row["sft"], row["seed"]): float(row["value"]) for row in csv.DictReader(file)}

    def records(self) -> dict[str, Any]:
        """done.json of every finished step by its folder."""
        return {path.parent.name: json.loads(path.read_text()) for path in self.output.glob("*/*/done.json")}


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait, at most five minutes."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


EVERY_STEP = Counter(
    {f"train:{pre}{seed}": 1 for pre in "pt" for seed in "01"} | {f"tune:{sft}": 4 for sft in "sl"}
)  # fmt: skip
