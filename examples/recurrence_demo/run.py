"""Retrofitted recurrence in miniature: what does depth buy, on problems that need it?

python examples/recurrence_demo/run.py --output runs/recurrence-demo     (`make recurrence-demo`)

Every step is a command line of this project, shown before it runs. A parent that knows walks of one and two doors is
cut and looped, trained on longer walks, and answers held-out walks at several depths; so is the baseline, cut but not
looped. `--arms all` adds the comparisons of `make recurrence-study`. The report is OUTPUT/report. Run again, it starts
from the beginning.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from arms import ALL_ARMS, MAIN_ARMS, RECURRENT, STATIC, UNTRAINED, Arm, measured_costs, planned_steps, stages
from house import LENGTHS
from parent import pack, train
from report import write_depth_report

from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.fields import PositiveInt
from megatron_tpt.errors import UserError
from megatron_tpt.files import write_json
from megatron_tpt.studies.commands import Commands, empty_earlier
from megatron_tpt.studies.results import Point

HERE = Path(__file__).resolve().parent
MARK = "recurrence_demo.json"
SPLIT = "1,1,1"
# One step so small that it changes no weight: the tools need a checkpoint to start from.
NO_TRAINING = (
    "--training.num_steps=1", "--optimizer.schedule=constant", "--optimizer.warmup_steps=0",
    "--optimizer.wsd_decay_steps=null", "--optimizer.learning_rate=1.0e-30", "--optimizer.adam_learning_rate=1.0e-30",
    "--optimizer.min_learning_rate=0",
)  # fmt: skip


@dataclass(frozen=True)
class DemoOptions:
    """Where to run the miniature, and its size."""

    output: Path = Path("runs/recurrence-demo")
    """The run's folder. A folder of an earlier run is emptied first."""
    seed: int = 0
    """Decides the walks, the order of the data, the depths and the initial states."""
    arms: Literal["main", "all"] = "main"
    """The recurrent model and the static baseline, or all comparisons."""
    parent: Path = HERE / "parent"
    """The model to cut; `make recurrence-parent` trains such a one. Its tokenizer is that of all arms."""
    new_parent: bool = False
    """Train another parent of this seed, with the tokenizer of --parent, and cut that."""
    num_steps: Annotated[int, Ge(32)] = 320
    """Steps of the recurrent arm and of those with as many tokens; the first 20 of every arm warm up."""
    num_problems: PositiveInt = 100
    """Held-out walks of every length."""


class Demo:
    """One run of the miniature; every method is one stage."""

    def __init__(self, options: DemoOptions) -> None:
        self.options = options
        self.output = options.output.resolve()
        self.parent = options.parent.resolve()
        self.arms = MAIN_ARMS if options.arms == "main" else ALL_ARMS
        self.packed: dict[str, Path] = {}
        self.starts: dict[str, Path] = {}
        self.steps: dict[Arm, int] = {}
        self.seconds: dict[Arm, float] = {}
        if not (self.parent / "config.json").is_file():
            raise UserError(f"{self.parent}: no model there; `make recurrence-parent` trains one")
        empty_earlier(self.output, MARK)
        write_json(self.output / MARK, {name: str(value) for name, value in asdict(options).items()})
        self.commands = Commands(self.output / "logs")

    def run(self) -> None:
        """Everything, from the walks to the report."""
        self.commands.python(
            "house",
            HERE / "house.py", "--output", self.output / "data", "--seed", str(self.options.seed),
            "--num-problems", str(self.options.num_problems),
        )  # fmt: skip
        self.packed = {
            name: pack(self.commands, self.output / f"data/{name}.jsonl", self.parent)
            for name in ("atoms", *(f"train_{longest}" for longest in LENGTHS))
        }
        self.make_starts()
        self.steps = {arm: planned_steps(arm, self.options.num_steps, self.starts) for arm in self.arms}
        # Two at a time: one for each of the two cores that the miniature is made for. The longest ones begin.
        pool = ThreadPoolExecutor(max_workers=2)
        try:
            order = sorted(self.arms, key=lambda arm: (-arm.is_recurrent, -self.steps[arm]))
            done = {arm: pool.submit(self.train_arm, arm) for arm in order}
            self.seconds = {arm: done[arm].result() for arm in self.arms}
        finally:
            pool.shutdown(cancel_futures=True)
        self.measure()
        self.report()

    def make_starts(self) -> None:
        """The checkpoints from which arms start."""
        parent = self.parent
        if self.options.new_parent:
            parent = train(self.commands, self.output / "parent", self.packed["atoms"], self.options.seed)
        self.starts[RECURRENT.start] = self.retrofit("recurrent", parent, "--adapter", "identity")
        self.starts[STATIC.start] = self.retrofit("static", parent, "--static")
        if UNTRAINED in self.arms:
            folder = self.output / "random_parent"
            parent = train(self.commands, folder, self.packed["atoms"], self.options.seed, *NO_TRAINING)
            self.starts[UNTRAINED.start] = self.retrofit("random", parent, "--adapter", "identity")

    def retrofit(self, name: str, parent: Path, *options: str) -> Path:
        """Cut a parent: its first layer, the one but the last, and the last. Returns the checkpoint."""
        folder = self.output / "start" / name
        self.commands.python(
            f"retrofit_{name}",
            "tools/retrofit.py", "--model", parent, "--split", SPLIT, *options, "--output", folder,
        )  # fmt: skip
        return folder

    def run_folder(self, arm: Arm) -> Path:
        """Where an arm is trained."""
        return self.output / "heal" / arm.folder

    def train_arm(self, arm: Arm) -> float:
        """Train an arm on walks that become longer: each stage resumes the run with its own file. Returns seconds."""
        begin = time.monotonic()
        for longest, end in stages(self.steps[arm]).items():
            self.commands.python(
                f"{arm.folder}_{longest}",
                "-m", "megatron_tpt.finetune", HERE / "heal.yaml", f"--run.output_dir={self.run_folder(arm)}",
                f"--run.seed={self.options.seed}", f"--training.init_from={self.starts[arm.start]}",
                f"--data.train=[{self.packed[f'train_{longest}']}]", f"--training.num_steps={end}",
                *arm.settings(self.steps[arm]),
            )  # fmt: skip
        return time.monotonic() - begin

    def measure(self) -> None:
        """All arms answer all problems, in one process."""
        checkpoints = [self.run_folder(arm) / "checkpoints/latest" for arm in self.arms]
        self.commands.python(
            "measure",
            HERE / "measure.py", "--checkpoints", *checkpoints, "--problems", self.output / "data/problems.jsonl",
            "--output", self.output / "accuracy",
        )  # fmt: skip

    def report(self) -> None:
        """report/results.json, the tables and the picture."""
        results = json.loads((self.output / "accuracy/accuracy.json").read_text(encoding="utf-8"))["results"]
        num_problems = self.options.num_problems * len(LENGTHS)
        points: list[Point] = []
        runs: list[dict[str, Any]] = []
        by_doors: dict[str, dict[str, float]] = {}
        for arm, result in zip(self.arms, results, strict=True):
            costs = measured_costs(self.run_folder(arm))
            runs.append({"arm": arm.name, **costs, "seconds": self.seconds[arm]})
            for depth in arm.depths:
                measured = result["accuracy"][str(depth)]
                label = arm.label(depth)
                points.append(Point(label, costs["tokens"], measured["all"], num_problems, self.options.seed))
                by_doors[label] = {str(doors): measured[str(doors)] for doors in LENGTHS}
        path = self.output / "report/results.json"
        write_json(
            path,
            {"seed": self.options.seed, "points": list(map(asdict, points)), "runs": runs, "by_doors": by_doors},
        )
        write_depth_report(self.output / "report", [path])
        self.commands.say(f"done: {self.output / 'report/report.md'}")


if __name__ == "__main__":
    run(lambda: Demo(parse(DemoOptions, description=__doc__)).run())
