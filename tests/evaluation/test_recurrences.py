"""tools/evaluate.py on recurrent models: problems and documents at several depths in one command."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zstandard
from tiny_models import CORPUS, make_model

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.evaluate import evaluate
from megatron_tpt.evaluation.options import EvaluateOptions, parse_benchmarks
from megatron_tpt.evaluation.recurrences import Point, Score, rows, unrolled_parameters
from megatron_tpt.evaluation.samples import Answer, Store
from megatron_tpt.generation import (
    EarlyExit,
    EngineOptions,
    Sampling,
    complete,
    document_log_likelihoods,
    load_tokenizer,
    open_engine,
    prefix_id,
    weight_shapes,
)
from megatron_tpt.grading import after_thinking
from megatron_tpt.interop.hf_export import export_hf, read_model_config
from megatron_tpt.interop.options import ExportOptions, RetrofitOptions
from megatron_tpt.interop.retrofit import retrofit
from megatron_tpt.models.recurrent.config import RecurrentConfig
from megatron_tpt.models.spec import register_classes

PROMPTS = [f"{text} {i}" for i in range(4) for text in CORPUS]
GREEDY = Sampling(temperature=0, max_new_tokens=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A recurrent model of a prelude and a recurrent layer, and its parent."""
    folder = tmp_path_factory.mktemp("arms")
    parent = make_model(folder / "parent")
    retrofit(RetrofitOptions(Path(parent), folder / "checkpoint", split="1,1,0", adapter="add"))
    export_hf(ExportOptions(folder / "checkpoint", folder / "looped"))
    return {"looped": str(folder / "looped"), "parent": parent, "checkpoint": str(folder / "checkpoint")}


def engine_of(models: dict[str, str], depth: int | None, **options: object) -> EngineOptions:
    return EngineOptions(models["looped"], 256, num_recurrences=depth, kind="transformers", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def problems(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems to which the model with two iterations knows the answers."""
    with open_engine(engine_of(models, 2)) as engine:
        texts = [completion.text for completion in complete(engine, PROMPTS, GREEDY)]
    rows = [
        {"prompt": prompt, "answer": text.strip()}
        for prompt, text in zip(PROMPTS, texts, strict=True)
        if (after_thinking(text) or "") == text and text.strip()
    ]
    assert len(rows) >= 4
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*CORPUS, " ".join(CORPUS * 3)]))
    return path


@torch.no_grad()
def reference(model: str, documents: Path, depth: int) -> tuple[float, int]:
    """Log-likelihood and number of tokens of documents that fit into a window, by one pass of the model for each."""
    register_classes(models=True)
    looped = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer, total, count = load_tokenizer(model), 0.0, 0
    for line in documents.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
        logits = looped(torch.tensor([[tokenizer.eos_token_id, *ids]]), num_recurrences=depth).logits[0, :-1]
        total += float(logits.log_softmax(-1)[range(len(ids)), ids].sum())
        count += len(ids)
    return total, count


def test_one_command_evaluates_every_depth(
    models: dict[str, str], problems: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = EvaluateOptions(
        model=[models["looped"], models["parent"]], output=tmp_path / "out", data=problems, documents=documents,
        recurrences="4,1,2", training_flops=[2e18, 1e18], engine="transformers", max_new_tokens=8,
    )  # fmt: skip
    results = evaluate(options)
    assert [(Path(result.model).name, result.recurrences) for result in results] == [
        ("looped", 1), ("looped", 2), ("looped", 4), ("parent", None)
    ]  # fmt: skip
    accuracy = {result.recurrences: result.accuracy for result in results}
    assert accuracy[2] == 1 and max(accuracy[1], accuracy[4]) < 1
    for result in results:
        assert (tmp_path / "out" / result.samples).is_file()
    assert results[0].samples == "looped/r1/problems/samples.jsonl.zst"
    assert results[3].samples == "parent/problems/samples.jsonl.zst"

    written = json.loads((tmp_path / "out/results.json").read_text())
    assert [one["recurrences"] for one in written["documents"]] == [1, 2, 4, None]
    compared = [(one["recurrences"], one["than_recurrences"]) for one in written["comparisons"]]
    assert compared == [(2, 1), (4, 1), (None, 1), (4, 2), (None, 2), (None, 4)]
    assert written["comparisons"][0]["difference"] == pytest.approx(1 - accuracy[1])
    for one in written["documents"][:3]:
        total, count = reference(models["looped"], documents, one["recurrences"])
        assert (one["num_documents"], one["num_tokens"]) == (len(CORPUS) + 1, count)
        assert one["perplexity"] == pytest.approx(math.exp(-total / count), rel=1e-4)
        num_bytes = sum(len(json.loads(line)["text"]) for line in documents.read_text().splitlines())
        assert one["bits_per_byte"] == pytest.approx(-total / math.log(2) / num_bytes, rel=1e-4)
    points = written["recurrences"]
    assert [point["training_flops"] for point in points] == [2e18, 2e18, 2e18, 1e18]
    assert [point["scores"]["problems"]["value"] for point in points] == [result.accuracy for result in results]
    perplexities = [one["perplexity"] for one in written["documents"]]
    assert [point["scores"]["documents"]["value"] for point in points] == perplexities
    lines = (tmp_path / "out/report.md").read_text().splitlines()
    for depth in (1, 2, 4):
        assert sum(line.startswith(f"| {models['looped']}, r = {depth} |") for line in lines) >= 3

    table = (tmp_path / "out/recurrences.md").read_text()
    assert table.splitlines()[2] in capsys.readouterr().out
    assert len(table.splitlines()) == 2 + 2 + len(points)
    assert (tmp_path / "out/recurrences.png").read_bytes().startswith(b"\x89PNG")


def test_unrolled_parameters_are_those_of_the_configuration(models: dict[str, str]) -> None:
    model = read_model_config(Path(models["checkpoint"]))
    assert isinstance(model, RecurrentConfig)
    shapes = weight_shapes(models["looped"])
    for depth in (1, 2, 16):
        assert unrolled_parameters(shapes, depth) == model.unrolled_parameters(depth)
    assert unrolled_parameters(weight_shapes(models["parent"]), None) == model.unrolled_parameters(1)


def test_early_exit_reports_the_depths_of_the_generated_tokens(
    models: dict[str, str], problems: Path, tmp_path: Path
) -> None:
    options = EvaluateOptions(
        model=[models["looped"]], output=tmp_path / "out", data=problems, recurrences="6", engine="transformers",
        max_new_tokens=8, exit_criterion="state", exit_threshold=1e9, max_num_seqs=3,
    )  # fmt: skip
    [result] = evaluate(options)
    num_answers, num_tokens = result.num_problems, round(result.mean_output_tokens * result.num_problems)
    assert result.depths == {"1": num_tokens - num_answers, "6": num_answers}  # the first token is that of the prompt
    assert result.mean_depth == pytest.approx((num_tokens + 5 * num_answers) / num_tokens)
    assert "iterations per token" in (tmp_path / "out/recurrences.md").read_text()
    with open_engine(engine_of(models, 6, early_exit=EarlyExit("kl", 1e-30))) as engine:
        never = complete(engine, PROMPTS, GREEDY)
    assert all(completion.depths == (6,) * completion.num_tokens for completion in never)
    with open_engine(engine_of(models, 6)) as engine:
        assert complete(engine, PROMPTS, GREEDY) == [dataclasses.replace(one, depths=None) for one in never]


def test_documents_are_scored_in_windows_of_the_same_size(
    models: dict[str, str], problems: Path, documents: Path, tmp_path: Path
) -> None:
    """Whatever context the problems beside them need."""
    tokenizer = load_tokenizer(models["parent"])
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    with open_engine(EngineOptions(models["parent"], 32, kind="transformers")) as engine:
        likelihoods = document_log_likelihoods(engine, ids, prefix_id(tokenizer))
    assert max(map(len, ids)) > 64
    options = EvaluateOptions(
        model=[models["parent"]], output=tmp_path / "alone", documents=documents, document_window=32,
        engine="transformers",
    )  # fmt: skip
    evaluate(options)
    evaluate(dataclasses.replace(options, output=tmp_path / "both", data=problems, limit=4))
    expected = math.exp(-math.fsum(one.total for one in likelihoods) / sum(map(len, ids)))
    for output in ("alone", "both"):
        [one] = json.loads((tmp_path / output / "results.json").read_text())["documents"]
        assert one["perplexity"] == pytest.approx(expected, rel=1e-5)


def resumable(models: dict[str, str], problems: Path, documents: Path, output: Path) -> EvaluateOptions:
    """One request at a time: in other batches, likelihoods differ in their last digits."""
    return EvaluateOptions(
        model=[models["looped"]], output=output, data=problems, documents=documents, recurrences="1,2",
        engine="transformers", max_new_tokens=8, max_num_seqs=1,
    )  # fmt: skip


def test_the_same_command_resumes_every_depth(
    models: dict[str, str], problems: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exits: dict[str, Any] = {"exit_criterion": "entropy", "exit_threshold": 5.8}
    whole = dataclasses.replace(resumable(models, problems, documents, tmp_path / "whole"), **exits)
    evaluate(whole)
    # What a run leaves that was killed at the second depth: journals with some answers.
    folder = tmp_path / "killed/looped/r2"
    shutil.copytree(tmp_path / "whole/looped", tmp_path / "killed/looped")
    num_missing = 0
    for name in ("problems", "documents"):
        store = Store(folder / name)
        rows = [json.loads(line) for line in zstandard.open(store.samples_path, "rt")]
        store.samples_path.unlink()
        num_missing += len(rows) - 2
        with store.journal(0) as journal:
            for row in rows[:2]:
                journal.add(Answer(**{each.name: row[each.name] for each in dataclasses.fields(Answer)}))
    capsys.readouterr()
    killed = dataclasses.replace(whole, output=tmp_path / "killed")
    evaluate(killed)
    assert f"r = 2: {num_missing} of {num_missing} answers" in capsys.readouterr().err
    for name in ("results.json", "recurrences.md", "looped/r2/documents/samples.jsonl.zst"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    evaluate(killed)
    assert "answers," not in capsys.readouterr().err  # no engine was started
    evaluate(dataclasses.replace(killed, recurrences="1,2,3"))
    error = capsys.readouterr().err
    assert "r = 3: " in error and "r = 1: " not in error


def test_what_decides_outputs_is_refused_by_name_and_grading_needs_no_engine(
    models: dict[str, str], problems: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = resumable(models, problems, documents, tmp_path)
    before = evaluate(options)
    with pytest.raises(UserError, match=r"benchmark\.document_window was null, now 16"):
        evaluate(dataclasses.replace(options, document_window=16))
    with pytest.raises(UserError, match="early_exit was null, now"):
        evaluate(dataclasses.replace(options, exit_criterion="kl", exit_threshold=0.1))
    monkeypatch.setattr("megatron_tpt.evaluation.asking.open_engine", None)
    written = (tmp_path / "results.json").read_text()
    assert evaluate(dataclasses.replace(options, rescore=True)) == before
    assert (tmp_path / "results.json").read_text() == written
    after = evaluate(dataclasses.replace(options, rescore=True, answer_pattern="zzz"))
    assert [(result.recurrences, result.accuracy) for result in after] == [(1, 0), (2, 0)]
    assert json.loads((tmp_path / "results.json").read_text())["documents"] == json.loads(written)["documents"]


def test_another_default_depth_is_refused(models: dict[str, str], problems: Path, tmp_path: Path) -> None:
    """A model without --recurrences runs at the depth of its config.json, which is recorded like one that is given."""
    model = tmp_path / "looped"
    shutil.copytree(models["looped"], model)
    options = EvaluateOptions(
        model=[str(model)], output=tmp_path / "out", data=problems, engine="transformers", max_new_tokens=2, limit=1
    )
    [result] = evaluate(options)
    config = json.loads((model / "config.json").read_text())
    assert result.recurrences == config["num_recurrences"]
    (model / "config.json").write_text(json.dumps(config | {"num_recurrences": 9}))
    with pytest.raises(UserError, match=rf"num_recurrences was {config['num_recurrences']}, now 9"):
        evaluate(options)


def test_tasks_share_every_depth_and_the_documents(
    models: dict[str, str], problems: Path, documents: Path, tmp_path: Path
) -> None:
    evaluate(resumable(models, problems, documents, tmp_path / "whole"))
    tool = Path(__file__).parents[2] / "tools/evaluate.py"
    arguments = [
        "--model", models["looped"], "--data", str(problems), "--documents", str(documents), "--recurrences", "1,2",
        "--engine", "transformers", "--max-new-tokens", "8", "--num-tasks", "2", "--max-num-seqs", "1",
    ]  # fmt: skip
    subprocess.run([sys.executable, str(tool), *arguments, "--output", str(tmp_path / "split")], check=True)
    whole, split = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "split"))
    assert split["recurrences"] == whole["recurrences"] and split["models"] == whole["models"]


def test_documents_stand_beside_benchmarks_and_are_one(models: dict[str, str], documents: Path, tmp_path: Path) -> None:
    """A file with `scoring: perplexity` measures what --documents does."""
    (tmp_path / "mine.yaml").write_text(f"data: {documents}\nprompt_column: text\nscoring: perplexity\n")
    arguments = ["--model", models["looped"], "--output", str(tmp_path / "out"), "--engine", "transformers"]
    arguments += ["--benchmark", str(tmp_path / "mine.yaml"), "--documents", str(documents)]
    assert evaluate(parse_benchmarks(arguments)) == []
    mine, given = json.loads((tmp_path / "out/results.json").read_text())["documents"]
    assert (mine["benchmark"], given["benchmark"]) == ("mine", "documents")
    assert mine["perplexity"] == given["perplexity"] > 1


def test_columns_that_no_model_has_are_omitted() -> None:
    point = Point("m/a", "a", 4, 1000, None, {"texts": Score("perplexity", 2.5)})
    header = ["model", "r", "parameters, unrolled", "texts: perplexity"]
    assert rows([point]) == (header, [["a", "4", "1,000", "2.5000"]])
    both = [
        Point("a", "a", 4, 1000, None, {"sums": Score("accuracy", 0.25), "texts": Score("perplexity", None)}),
        Point("b", "b", None, 10, 1e20, {"sums": Score("accuracy", 0.5, 0.02, 2.5), "texts": Score("perplexity", 2.5)}),
    ]
    header, (first, second) = rows(both)
    assert header[3:] == ["training FLOPs", "sums: accuracy in %", "sums: iterations per token", "texts: perplexity"]
    assert first[3:] == ["", "25.0", "", ""]
    assert second == ["b", "-", "10", "1.000e+20", "50.0 ± 2.0", "2.50", "2.5000"]


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (lambda m: {"data": None}, "nothing to evaluate: name a --benchmark, or give --data with problems or --docu"),
        (lambda m: {"document_window": 32}, "--document-window is for --documents: give both"),
        (lambda m: {"scoring": "perplexity", "chat": True}, "--scoring perplexity is of documents"),
        (
            lambda m: {"recurrences": "2", "engine": "endpoint", "endpoints": ["http://h/v1"], "tokenizer": "t"},
            'num_recurrences=2 cannot be chosen for the engine "endpoint"',
        ),
        (lambda m: {"recurrences": "1,x"}, "--recurrences 1,x: give numbers from 1 on with commas between them"),
        (lambda m: {"recurrences": "0,1"}, "--recurrences 0,1: give numbers from 1 on with commas between them"),
        (lambda m: {"exit_criterion": "kl"}, "early exit needs --exit-criterion and --exit-threshold"),
        (lambda m: {"training_flops": [1e18]}, "--training-flops: give one number for each --model"),
        (lambda m: {"recurrences": "2", "model": [m["parent"]]}, "--recurrences is for recurrent models"),
        (
            lambda m: {"exit_criterion": "kl", "exit_threshold": 1.0, "model": [m["parent"]]},
            "--exit-criterion is for recurrent models",
        ),
        (
            lambda m: {"exit_criterion": "kl", "exit_threshold": 1.0, "engine": "vllm"},
            'the engine "vllm" has no early exit; omit it, or choose "transformers"',
        ),
        (
            lambda m: {"document_window": 1000, "documents": m["documents"]},
            "--document-window 1000 must be from 3 to 512",
        ),
        (lambda m: {"text_column": "body", "documents": m["documents"]}, "no column 'body'; its columns are text"),
        (
            lambda m: {"data": None, "documents": m["documents"], "max_new_tokens": 8},
            "--max-new-tokens is for problems, and there are none beside --documents",
        ),
        (
            lambda m: {"data": None, "documents": m["documents"], "exit_criterion": "kl", "exit_threshold": 1.0},
            "--exit-criterion is for tokens that are generated",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    change: Callable[[dict[str, str]], dict], reported: str, models: dict[str, str], problems: Path, documents: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    changes = change(models | {"documents": str(documents)})
    given = {"model": [models["looped"]], "data": problems, "engine": "transformers", **changes}
    with pytest.raises(UserError) as refusal:
        evaluate(EvaluateOptions(output=tmp_path / "out", **given))
    assert reported in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_depth_of_a_model_without_any_is_refused(models: dict[str, str]) -> None:
    for options, named in (
        ({"num_recurrences": 2}, "num_recurrences=2"),
        ({"early_exit": EarlyExit("kl", 1.0)}, "early exit"),
    ):
        with (
            pytest.raises(UserError, match=f"not a recurrent model, so it has no .*; omit {named}"),
            open_engine(EngineOptions(models["parent"], kind="transformers", **options)),  # type: ignore[arg-type]
        ):
            pass
