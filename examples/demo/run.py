"""The paper's main claim in miniature: train on documents alone, or on documents with thinking, and compare.

python examples/demo/run.py --output runs/demo     (`make demo`)

Every step is a command line of this project, shown before it runs. A small teacher thinks about the documents (vLLM);
two students of the same shape are trained from random weights at the same number of tokens, one on documents alone,
one on documents with the thinking behind them. Several checkpoints of both get the same fine-tuning and answer the
same held-out problems. The last table and picture are in OUTPUT/report. Run again, it starts from the beginning.
"""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from language import DAYS, Parcel, read_rows
from teacher import measure

from megatron_tpt.config.cli import parse, run
from megatron_tpt.errors import UserError
from megatron_tpt.files import write_json
from megatron_tpt.studies.commands import Commands, empty_earlier
from megatron_tpt.studies.report import write_report
from megatron_tpt.studies.results import Point, summarize

HERE = Path(__file__).resolve().parent
DOCUMENTS, THINKING = "documents alone", "documents with thinking"
FOLDERS = {DOCUMENTS: "documents", THINKING: "thinking"}
MARK = "demo.json"


@dataclass(frozen=True)
class DemoOptions:
    """Where to run the demo, and its size."""

    output: Path = Path("runs/demo")
    """The run's folder. A folder of an earlier demo is emptied first."""
    seed: int = 0
    """Decides the documents, the initial weights, the order of the data and the thinking."""
    teacher: Path = HERE / "teacher"
    """The model that thinks; `make teacher` trains such a one. Its tokenizer is the students' too."""
    num_documents: int = 32000
    """Documents there are. The arm without thinking trains on all of them."""
    num_thoughts: int = 8000
    """Documents, from the first on, that the teacher thinks about. The other arm trains only on these."""
    num_sft: int = 1024
    """Examples that every checkpoint is fine-tuned on."""
    num_problems: int = 300
    """Held-out problems."""


class Demo:
    """One run of the demo; every method is one stage."""

    def __init__(self, options: DemoOptions) -> None:
        self.options = options
        self.output = options.output.resolve()
        self.teacher = options.teacher.resolve()
        if not (self.teacher / "config.json").is_file():
            raise UserError(f"{self.teacher}: no model there; `make teacher` trains one")
        empty_earlier(self.output, MARK)
        write_json(self.output / MARK, {name: str(value) for name, value in asdict(options).items()})
        self.commands = Commands(self.output / "logs")

    def run(self) -> None:
        """Everything, from the documents to the picture."""
        self.write_documents()
        # Two processes at a time: one for each of the two cores that the demo is made for.
        pool = ThreadPoolExecutor(max_workers=2)
        try:
            arms = {arm: pool.submit(self.train_arm, arm) for arm in (THINKING, DOCUMENTS)}
            jobs: dict[tuple[str, int, str], Future[Path]] = {}
            for arm in FOLDERS:  # documents alone are done first; their fine-tuning does not wait for the thinking
                steps = arms[arm].result()
                jobs |= {(arm, step, "sft"): pool.submit(self.finetune, arm, step, "sft") for step in steps}
            jobs[DOCUMENTS, steps[-1], "sft_direct"] = pool.submit(self.finetune, DOCUMENTS, steps[-1], "sft_direct")
            models = [model.result() for model in jobs.values()]
        finally:
            pool.shutdown(cancel_futures=True)
        self.evaluate(models)
        self.report(list(jobs))

    def write_documents(self) -> None:
        """Documents, fine-tuning examples and held-out problems; language.py checks that none is in two of them."""
        self.commands.python(
            "language",
            HERE / "language.py", "--output", self.output / "data", "--seed", str(self.options.seed),
            "--num-documents", str(self.options.num_documents), "--num-sft", str(self.options.num_sft),
            "--num-problems", str(self.options.num_problems),
        )  # fmt: skip

    def train_arm(self, arm: str) -> list[int]:
        """Index the arm's documents, thought about first where that is the arm, and pre-train on them.

        Returns the steps that have a checkpoint.
        """
        name = FOLDERS[arm]
        corpus = self.output / "data/documents.jsonl"
        if arm == THINKING:
            self.commands.python(
                "augment",
                "tools/augment.py", "--input", corpus, "--output", self.output / "augmented",
                "--model", self.teacher, "--limit", str(self.options.num_thoughts),
                "--max-new-tokens", "32", "--seed", str(self.options.seed),
            )  # fmt: skip
            corpus = self.output / "augmented"
        index = self.output / "index" / name
        self.commands.python(
            f"index_{name}", "tools/index.py", "--input", corpus, "--tokenizer", self.teacher, "--output", index
        )
        self.commands.python(
            f"pretrain_{name}",
            "-m", "megatron_tpt.pretrain", HERE / "pretrain.yaml",
            f"--run.output_dir={self.output / 'pretrain' / name}", f"--run.seed={self.options.seed}",
            f"--data.train=[{{path: {index}}}]",
        )  # fmt: skip
        folders = (self.output / "pretrain" / name / "checkpoints").glob("step_*")
        return sorted(int(folder.name.removeprefix("step_")) for folder in folders)

    def finetune(self, arm: str, step: int, examples: str) -> Path:
        """Fine-tune one checkpoint and export the model. Returns the model's folder."""
        name = f"{FOLDERS[arm]}_{step}_{examples}"
        self.commands.python(
            f"finetune_{name}",
            "-m", "megatron_tpt.finetune", HERE / "finetune.yaml",
            f"--run.output_dir={self.output / 'finetune' / name}", f"--run.seed={self.options.seed}",
            f"--training.init_from={self.output / 'pretrain' / FOLDERS[arm] / 'checkpoints' / f'step_{step:08d}'}",
            f"--data.train=[{self.output / 'data' / f'{examples}.jsonl'}]",
        )  # fmt: skip
        model = self.output / "models" / name
        self.commands.python(
            f"export_{name}",
            "tools/export_hf.py", "--checkpoint", self.output / "finetune" / name / "checkpoints/latest",
            "--output", model,
        )  # fmt: skip
        return model

    def evaluate(self, models: list[Path]) -> None:
        """All models answer all problems, greedily, in one process."""
        self.commands.python(
            "evaluate",
            "tools/evaluate.py", "--model", *models, "--data", self.output / "data/problems.jsonl",
            "--output", self.output / "evaluation", "--answer-pattern", r"Answer: (\w+)", "--max-new-tokens", "32",
            num_threads=2,
        )  # fmt: skip

    def report(self, jobs: list[tuple[str, int, str]]) -> None:
        """results.json, table.md and accuracy.png, and the table on the terminal."""
        results = json.loads((self.output / "evaluation/results.json").read_text(encoding="utf-8"))["models"]
        points = []
        for (arm, step, examples), result in zip(jobs, results, strict=True):
            # The control is a line of its own: fine-tuned to answer at once, as its documents do.
            name = arm if examples == "sft" else f"{arm}, answers at once"
            tokens = self._metrics(arm)[step]["tokens"]
            points.append(Point(name, tokens, result["accuracy"], result["num_problems"], self.options.seed))
        report = self.output / "report"
        teacher = self._measure_teacher()
        write_json(
            report / "results.json",
            {"seed": self.options.seed, "teacher": teacher, "points": [asdict(point) for point in points]},
        )
        title = f"Accuracy on {self.options.num_problems} held-out problems, seed {self.options.seed}"
        write_report(report, summarize(points), title, chance=1 / len(DAYS))
        self.commands.say(f"the teacher's thoughts: {teacher['right']:.1%} right in every step")
        self.commands.say(
            f"this is one run, of seed {self.options.seed}. The table in README.md has the means of five other seeds: "
            f"early checkpoints differ from seed to seed, because the skill appears at different steps; the last ones "
            f"should agree. `make study` runs those five"
        )
        self.commands.say(f"done: {report / 'table.md'}, {report / 'accuracy.png'}")

    def _measure_teacher(self) -> dict[str, float]:
        documents = (row["text"] for row in read_rows(self.output / "data/documents.jsonl"))
        return measure(self.output / "augmented", {text: Parcel.from_document(text) for text in documents})

    def _metrics(self, arm: str) -> dict[int, dict[str, Any]]:
        """The logged metrics of the arm's pre-training, by step."""
        path = self.output / "pretrain" / FOLDERS[arm] / "metrics.jsonl"
        return {row["step"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


if __name__ == "__main__":
    run(lambda: Demo(parse(DemoOptions, description=__doc__)).run())
