"""tools/evaluate.py on recurrent models: problems and documents at several depths in one command."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import CORPUS, make_model

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.evaluate import evaluate
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.evaluation.recurrences import Point, rows, unrolled_parameters
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
    assert results[0].samples == "looped/r1/samples.jsonl" and results[3].samples == "parent/samples.jsonl"

    written = json.loads((tmp_path / "out/results.json").read_text())
    assert [one["recurrences"] for one in written["documents"]] == [1, 2, 4, None]
    for one in written["documents"][:3]:
        total, count = reference(models["looped"], documents, one["recurrences"])
        assert (one["num_documents"], one["num_tokens"]) == (len(CORPUS) + 1, count)
        assert one["perplexity"] == pytest.approx(math.exp(-total / count), rel=1e-4)
        num_bytes = sum(len(json.loads(line)["text"]) for line in documents.read_text().splitlines())
        assert one["bits_per_byte"] == pytest.approx(-total / math.log(2) / num_bytes, rel=1e-4)
    points = written["recurrences"]
    assert [point["training_flops"] for point in points] == [2e18, 2e18, 2e18, 1e18]
    assert [point["accuracy"] for point in points] == [result.accuracy for result in results]

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
    assert result.depths == {1: num_tokens - num_answers, 6: num_answers}  # the first token is that of the prompt
    assert result.mean_depth == pytest.approx((num_tokens + 5 * num_answers) / num_tokens)
    assert "iterations per token" in (tmp_path / "out/recurrences.md").read_text()
    with open_engine(engine_of(models, 6, early_exit=EarlyExit("kl", 1e-30))) as engine:
        never = complete(engine, PROMPTS, GREEDY)
        assert engine.stats().depths == {6: sum(completion.num_tokens for completion in never)}
    with open_engine(engine_of(models, 6)) as engine:
        assert complete(engine, PROMPTS, GREEDY) == never
        assert not engine.stats().depths


def test_documents_are_scored_in_windows_of_the_same_size(models: dict[str, str]) -> None:
    """Whatever the context of the engine."""
    tokenizer = load_tokenizer(models["parent"])
    ids = [tokenizer(" ".join(CORPUS), add_special_tokens=False).input_ids]
    found = []
    for context in (32, 256):
        with open_engine(EngineOptions(models["parent"], context, kind="transformers")) as engine:
            found.append(document_log_likelihoods(engine, ids, prefix_id(tokenizer), 32)[0].total)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_columns_that_no_model_has_are_omitted() -> None:
    point = Point("a", 4, 1000, None, None, None, None, 2.5)
    assert rows([point]) == (["model", "r", "parameters, unrolled", "perplexity"], [["a", "4", "1,000", "2.5000"]])
    measured = Point("b", None, 10, 1e20, 0.5, 0.02, 2.5, None)
    header, (first, second) = rows([point, measured])
    assert header[3:] == ["training FLOPs", "accuracy in %", "iterations per token", "perplexity"]
    assert first[3:] == ["", "", "", "2.5000"]
    assert second == ["b", "-", "10", "1.000e+20", "50.0 ± 2.0", "2.50", ""]


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (lambda m: {"data": None}, "nothing to evaluate: give --data with problems, --documents with texts, or both"),
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
        (lambda m: {"document_window": 1000}, "--document-window 1000 must be from 3 to 512"),
        (lambda m: {"text_column": "body"}, "column 'body' has no text; its columns are text"),
    ],
)
def test_what_makes_no_sense_is_refused(
    change: Callable[[dict[str, str]], dict], reported: str, models: dict[str, str], problems: Path, documents: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    given = {"model": [models["looped"]], "data": problems, "engine": "transformers", **change(models)}
    if {"document_window", "text_column"} & given.keys():
        given |= {"data": None, "documents": documents}
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
