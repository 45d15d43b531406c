"""`make study`, with one seed and fewer documents, problems and steps: every step is the same."""

import csv
from pathlib import Path

import pytest
import yaml

from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.studies.costs import costs, total
from megatron_tpt.studies.expand import expand
from megatron_tpt.studies.folders import place
from megatron_tpt.studies.options import StudyOptions
from megatron_tpt.studies.run import run_study
from megatron_tpt.studies.study import load_study

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {
    "language": ["--num-documents", "2000", "--num-sft", "64", "--num-problems", "20"],
    "think": ["--limit", "500"],
    "pretrain": ["--training.num_steps=40", "--checkpoint.save_interval=10", "--optimizer.warmup_steps=2"],
    "finetune": ["--training.num_steps=8", "--optimizer.warmup_steps=2"],
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize(("path", "num_steps"), [("demo", 5 * (1 + 1 + 2 + 2 + 9 + 9 + 1)), ("recurrence_demo", 5 + 1)])
def test_shared_steps_of_the_shipped_studies_are_one(path: str, num_steps: int) -> None:
    assert len(expand(load_study(REPOSITORY / f"examples/{path}/study.yaml")).nodes) == num_steps


def test_the_demo_takes_the_tokens_of_its_recipes(tmp_path: Path) -> None:
    graph = expand(load_study(REPOSITORY / "examples/demo/study.yaml"))
    place(graph, tmp_path, "present")
    assert total(costs(graph).values()).tokens == 5 * (2 * 600 * 16 * 128 + 9 * 512 * 5 * 128)


@pytest.mark.example(minutes=3)
@pytest.mark.timeout(2400)
def test_the_study_of_the_demo_compares_its_arms(tmp_path: Path) -> None:
    content = yaml.safe_load((REPOSITORY / "examples/demo/study.yaml").read_text())
    content["factors"]["seed"] = [0]
    for place_, checkpoint in enumerate(content["factors"]["trained"].values(), start=1):
        checkpoint["step"] = f"{10 * place_:08d}"
    for name, options in SMALL.items():
        content["steps"][name]["command"] += options
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    run_study(StudyOptions(tmp_path / "study.yaml", tmp_path / "runs", scale=ScaleOptions(num_workers=2)))
    with (tmp_path / "runs/report/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 + 1 and {row["trials"] for row in rows} == {"20"}
    first = {row["arm"]: row for row in rows if row["trained"] == "307200"}
    # A quarter of the pretraining, and the fine-tuning; the other arm's thinking was generated.
    assert float(first["documents alone"]["trained_tokens"]) == 10 * 16 * 128 + 8 * 5 * 128
    assert float(first["documents with thinking"]["flops"]) > float(first["documents alone"]["flops"])
    assert (tmp_path / "runs/report/accuracy-trained.png").stat().st_size > 1000
