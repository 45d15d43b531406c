"""`make front-loading-study`: its strata, what each arm takes, and its claims."""

import csv
import json
from pathlib import Path

import pytest
import trips
import yaml
from tokenizer import make_tokenizer

from megatron_tpt.config.cli import parse
from megatron_tpt.corpus.curate import curate
from megatron_tpt.corpus.curate_options import CurateOptions
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.records import read_records
from megatron_tpt.studies.costs import check_budget, costs
from megatron_tpt.studies.expand import expand
from megatron_tpt.studies.folders import place
from megatron_tpt.studies.options import StudyOptions
from megatron_tpt.studies.run import run_study
from megatron_tpt.studies.study import load_study

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "examples/front_loading_demo"
SMALL = {
    "trips": ["--num-base", "300", "--num-ldq", "1500", "--num-shq", "150", "--num-problems", "20"],
    "prefix": ["--training.num_steps=8", "--checkpoint.save_interval=8", "--optimizer.warmup_steps=2"],
    "pretrain": ["--training.num_steps=8", "--checkpoint.save_interval=8", "--optimizer.warmup_steps=2"],
    "finetune": ["--optimizer.warmup_steps=2"],
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_strata_are_those_of_the_paper_and_its_control(tmp_path: Path) -> None:
    trips.write_trips(trips.TripOptions(tmp_path, num_base=50, num_ldq=1500, num_shq=150, num_problems=5))
    make_tokenizer(tmp_path / "tokenizer", [json.loads((tmp_path / "words.jsonl").read_text())["text"]])
    command = yaml.safe_load((DEMO / "study.yaml").read_text())["steps"]["curate"]["command"]
    places = {"trips": tmp_path, "tokenizer": tmp_path / "tokenizer", "seed": 0, "output": tmp_path / "curated"}
    curate(parse(CurateOptions, [word.format(**places) for word in command[1:]]))
    records = list(read_records([tmp_path / "curated"]))
    strata = {name: [r for r in records if name in r.meta["strata"]] for name in ("ldq", "shq", "lmq", "alf")}
    assert len(records) == 50 + 1500 + 150  # nothing is a duplicate
    assert [len(strata[name]) for name in ("ldq", "shq", "lmq")] == [1500, 150, 1650]
    with_steps = {record.text for record in strata["ldq"] if record.text.count("+") == 12}
    assert {record.text for record in strata["alf"]} == with_steps and 0.4 < len(with_steps) / 1500 < 0.6
    control = [record for record in records if "ldq_as_shq" in record.meta["strata"]]
    assert all("ldq" in record.meta["strata"] for record in control)
    # By the tokens of question and answer; an index also has a newline and an end of sequence for each record.
    assert 0.99 < sum(r.meta["tokens"] for r in control) / sum(r.meta["tokens"] for r in strata["shq"]) <= 1
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    indexed = [sum(len(tokenizer.encode(r.text)) + 1 for r in chosen) for chosen in (control, strata["shq"])]
    assert indexed[0] / indexed[1] == pytest.approx(1, abs=0.05)
    # Fine-tuning asks as the problems do.
    asked = [record.text[: record.meta["answer_begin"]] for record in strata["lmq"]]
    assert all(question.endswith(" ?\n") and question.count("\n") == 1 for question in asked)


def test_arms_take_equal_tokens_and_share_what_they_have_in_common(tmp_path: Path) -> None:
    config = load_study(DEMO / "study.yaml")
    graph = expand(config)
    place(graph, tmp_path, "present")
    check_budget(graph, config.budget, costs(graph))
    assert len(graph.results) == 3 * 27
    runs = {step: sum(node.step == step for node in graph.nodes.values()) for step in config.steps}
    assert runs == {
        "trips": 3, "tokenizer": 3, "curate": 3, "base": 3, "stratum": 12, "pack": 15, "prefix": 3, "pretrain": 15,
        "finetune": 66, "export": 81, "evaluate": 3,
    }  # fmt: skip
    assert config.factors["seed"] == [1, 2, 3]  # 0 has chosen the settings


def test_every_claim_is_about_results_that_the_study_has() -> None:
    config = load_study(DEMO / "study.yaml")
    cells = {(one.levels["pretraining"], one.levels["sft"]) for one in expand(config).results}
    assert {claim.text[0] for claim in config.report.claims} == set("1234")
    for claim in config.report.claims:
        for side in (claim.of, claim.minus):
            pretraining = side["pretraining"] if isinstance(side["pretraining"], list) else [side["pretraining"]]
            assert {(one, side["sft"]) for one in pretraining} <= cells


@pytest.mark.example(minutes=6)
@pytest.mark.timeout(2400)
def test_the_miniature_compares_its_arms_and_judges_its_claims(tmp_path: Path) -> None:
    content = yaml.safe_load((DEMO / "study.yaml").read_text())
    content["factors"]["seed"] = [0]
    for level in content["factors"]["sft"].values():
        if "steps" in level:
            level["steps"] = 4 if level["steps"] == content["factors"]["sft"]["shq"]["steps"] else 8
    del content["budget"]
    for name, options in SMALL.items():
        content["steps"][name]["command"] += options
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    study = StudyOptions(tmp_path / "study.yaml", tmp_path / "runs", scale=ScaleOptions(num_workers=2))
    run_study(study)
    report = tmp_path / "runs/report"
    with (report / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27 and {row["trials"] for row in rows} == {"20"}
    with (report / "claims.csv").open() as file:
        claims = list(csv.DictReader(file))
    assert len(claims) == len(content["report"]["claims"])
    value = {(row["pretraining"], row["sft"]): float(row["value"]) for row in rows}
    assert float(claims[0]["mean"]) == pytest.approx(value["lmq", "shq"] - value["base", "shq"])
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    run_study(StudyOptions(study.study, study.output, report=True))
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before
