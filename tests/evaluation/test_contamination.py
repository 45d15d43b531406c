"""Which problems a training corpus held, beside the accuracy on the others."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_evaluate import read_samples
from tiny_models import make_model

from megatron_tpt.corpus.curate import curate
from megatron_tpt.corpus.curate_options import CurateOptions
from megatron_tpt.corpus.options import PrepareOptions
from megatron_tpt.corpus.prepare import prepare
from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.contamination import check_corpora, overlapping_rows
from megatron_tpt.evaluation.evaluate import evaluate
from megatron_tpt.evaluation.options import EvaluateOptions


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(number: int) -> str:
    """Twenty words that no other number has."""
    return " ".join(f"w{number}v{i}" for i in range(20))


def test_the_report_says_which_problems_a_corpus_held_and_the_accuracy_on_the_others(tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", seed=1, context=1024)
    common: dict[str, Any] = {"model": [model], "engine": "transformers", "max_new_tokens": 4}
    draft = write_rows(tmp_path / "draft.jsonl", [{"prompt": words(i), "answer": "x"} for i in range(6)])
    evaluate(EvaluateOptions(**common, data=draft, output=tmp_path / "draft"))
    outputs = [one.output.strip() for one in read_samples(tmp_path / "draft/hf/draft/samples.jsonl.zst")]
    answers = [*outputs[:3], *["something else"] * 3]  # three of six are right
    exam = write_rows(
        tmp_path / "exam.jsonl",
        [{"prompt": words(i), "answer": answer} for i, answer in enumerate(answers)],
    )
    held = [words(1), words(4)]  # the second row, and the fifth
    texts = [*(f"{words(90 + i)} {text}" for i, text in enumerate(held)), words(99)]  # one to keep
    raw = write_rows(tmp_path / "raw.jsonl", [{"text": text} for text in texts])
    for name, file in (("clean", exam), ("other", draft)):
        prepare(PrepareOptions([raw], tmp_path / name, decontaminate=[f"{name}={file}:prompt"], num_workers=1))

    corpora = [tmp_path / "clean", tmp_path / "other"]
    options = EvaluateOptions(**common, data=exam, output=tmp_path / "out", corpus=corpora)
    [result] = evaluate(options)
    assert result.accuracy == 3 / 6
    found = json.loads((tmp_path / "out/results.json").read_text())["contamination"]
    assert [(one["num_overlapping"], one["accuracy_without"]) for one in found] == [(2, 2 / 4), (None, None)]
    table = (tmp_path / "out/report.md").read_text()
    assert f"| {model} | exam | {corpora[0]} | 2 of 6 | 50.0% |" in table
    assert f"| {model} | exam | {corpora[1]} | not searched for |  |" in table
    with pytest.raises(UserError, match=r"--corpus .*raw: no finished output of tools/prepare.py"):
        evaluate(EvaluateOptions(**vars(options) | {"corpus": [tmp_path / "raw"]}))
    report = json.loads((tmp_path / "clean/report.json").read_text())
    for items in (3, [1], {"clean": 3}, {"clean": ["two"]}, None):
        (tmp_path / "clean/report.json").write_text(json.dumps(report | {"found_items": items}))
        with pytest.raises(UserError, match=r"--corpus .*clean: its report.json or prepare.json is damaged"):
            check_corpora([tmp_path / "clean"])


def test_a_curated_corpus_says_what_it_held_too(tmp_path: Path) -> None:
    exam = write_rows(tmp_path / "exam.jsonl", [{"prompt": words(i)} for i in range(4)])
    raw = write_rows(tmp_path / "raw.jsonl", [{"text": f"{words(9)} {words(2)}"}, {"text": words(8)}])
    options: dict[str, Any] = {"decontaminate": [f"exam={exam}:prompt"], "annotate": ["domain"], "num_workers": 1}
    curate(CurateOptions([f"all={raw}"], tmp_path / "clean", **options))
    check_corpora([tmp_path / "clean"])
    assert overlapping_rows(tmp_path / "clean", str(exam)) == {3}
    assert overlapping_rows(tmp_path / "clean", str(raw)) is None
    (tmp_path / "clean/curate.json").write_text("{}")
    with pytest.raises(UserError, match=r"its report.json or curate.json is damaged; run tools/curate.py"):
        check_corpora([tmp_path / "clean"])
