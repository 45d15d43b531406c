"""`make controls`: its rewritten records, and what each arm takes."""

import csv
import itertools
from pathlib import Path

import pytest
import yaml
from language import STUDENTS_PARCELS, sample_parcels
from rewrite import RewriteOptions, interleaved, rephrased, rewrite
from test_demo_study import SMALL
from tokenizers import Tokenizer

from megatron_tpt.indexing.join import Join, Piece, pieces
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.records import Record, read_records, write_records
from megatron_tpt.studies.costs import check_budget, costs
from megatron_tpt.studies.expand import expand
from megatron_tpt.studies.folders import place
from megatron_tpt.studies.options import StudyOptions
from megatron_tpt.studies.run import run_study
from megatron_tpt.studies.study import load_study

REPOSITORY = Path(__file__).resolve().parents[2]
STUDY = REPOSITORY / "examples/tpt_controls/study.yaml"
RECORDS = [Record(str(i), p.document, p.thinking) for i, p in enumerate(sample_parcels(STUDENTS_PARCELS, 20, 0))]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_a_rephrased_document_has_its_facts_and_as_many_tokens_as_its_thinking() -> None:
    tokenizer = Tokenizer.from_file(str(REPOSITORY / "examples/demo/teacher/tokenizer.json"))
    for record in RECORDS:
        text = rephrased(record).thinking or ""
        assert sorted(text.removesuffix(record.text[-3:]).split()) == sorted(record.text.split("\n")[0].split())
        assert len(tokenizer.encode(text).ids) == len(tokenizer.encode(record.thinking or "").ids)


def test_every_step_of_interleaved_thinking_is_behind_its_leg() -> None:
    record = interleaved(RECORDS[0])
    found = list(pieces(record, Join.interleaved))
    assert "".join(piece.text for piece in found if not piece.is_thinking) == record.text
    steps = [piece.text.split() for piece in found if piece.is_thinking]
    assert [word for step in steps for word in step] == (record.thinking or "").split() and len(steps) == 6
    for before, piece in itertools.pairwise(found):
        if piece.is_thinking:
            assert before.text.split()[-1] == piece.text.split()[-2]  # the leg


def test_thinking_without_a_step_for_each_leg_stays_behind_its_document() -> None:
    record = Record("0", RECORDS[0].text, "Mon a+1 Tue")
    assert list(pieces(interleaved(record), Join.interleaved))[1:] == [Piece("\nMon a+1 Tue\n", is_thinking=True)]


def test_only_the_first_records_are_rewritten_where_a_limit_is_given(tmp_path: Path) -> None:
    write_records(tmp_path / "in.jsonl", RECORDS)
    rewrite(RewriteOptions(tmp_path / "in.jsonl", "rephrase", tmp_path / "out", limit=3))
    assert list(read_records([tmp_path / "out"])) == [rephrased(record) for record in RECORDS[:3]]


def test_the_arms_take_equal_tokens_and_equal_compute(tmp_path: Path) -> None:
    config = load_study(STUDY)
    graph = expand(config)
    place(graph, tmp_path, "present")
    check_budget(graph, config.budget, costs(graph))
    assert len(graph.results) == 3 * 8 * 2
    # Of a seed: what all share, seven indices, eight arms, two of them with other steps at equal compute.
    assert len(graph.nodes) == 3 * (4 + 6 + 3 * 10 + 1)


@pytest.mark.example(minutes=4)
@pytest.mark.timeout(2400)
def test_the_study_of_the_controls_compares_its_arms(tmp_path: Path) -> None:
    content = yaml.safe_load(STUDY.read_text())
    content["factors"]["seed"] = [0]
    content["factors"]["equal"] = {"tokens": {"with": 20, "without": 20}, "compute": {"with": 20, "without": 30}}
    del content["budget"]
    for name in ("language", "think", "finetune"):
        content["steps"][name]["command"] += SMALL[name]
    content["steps"]["rephrase"]["command"] += ["--limit", "500"]
    content["steps"]["pretrain"]["command"] += ["--optimizer.warmup_steps=2"]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    run_study(StudyOptions(tmp_path / "study.yaml", tmp_path / "runs", scale=ScaleOptions(num_workers=2)))
    with (tmp_path / "runs/report/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 2
    generated = {row["arm"] for row in rows if float(row["generated_tokens"]) > 0}
    assert len(generated) == 6 and not generated & {"documents", "rephrased"}
