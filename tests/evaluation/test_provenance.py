"""How answers and grades were made is kept beside them: it is reported as it was, and nothing else mixes with it."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_evaluate import read_samples, write_problems
from tiny_models import make_model, make_tokenizer, unchanged_environment

from megatron_tpt.errors import Fault, UserError
from megatron_tpt.evaluation import evaluate as evaluating
from megatron_tpt.evaluation.arms import model_folders
from megatron_tpt.evaluation.evaluate import evaluate
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.evaluation.samples import Answer, Store
from megatron_tpt.jobs.folder import JobFolder
from megatron_tpt.jobs.lock import TaskLocked, task_lock

SAMPLES = "model/sums/samples.jsonl.zst"


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with unchanged_environment():
        yield


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> EvaluateOptions:
    """Options whose answers are in their output. Each answer is "different" as a text, and one is a right number."""
    folder = tmp_path_factory.mktemp("asked")
    data = write_problems(folder / "sums.jsonl", [{"prompt": f"{i} + 1 =", "answer": f"{i + 1}.0"} for i in range(2)])
    options = EvaluateOptions(
        model=[make_model(folder / "A/model")],
        data=data,
        output=folder / "out",
        answer_type="number",
        max_new_tokens=4,
        engine="transformers",
    )
    evaluate(options)
    samples = [dataclasses.replace(one, output="It is 1.") for one in read_samples(options.output / SAMPLES)]
    Store(options.output / "model/sums").finish(samples)  # nothing says how these are graded
    [result] = evaluate(options)
    assert result.accuracy == 0.5
    return options


@pytest.fixture
def options(asked: EvaluateOptions, tmp_path: Path) -> EvaluateOptions:
    shutil.copytree(asked.output, tmp_path / "out")
    return dataclasses.replace(asked, output=tmp_path / "out")


@pytest.fixture(autouse=True)
def _no_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "options" in request.fixturenames:
        request.getfixturevalue("asked")
        monkeypatch.setattr("megatron_tpt.evaluation.asking.open_engine", None)


def results(options: EvaluateOptions) -> dict[str, Any]:
    return json.loads((options.output / "results.json").read_text())


def test_graded_again_the_answers_are_of_the_engine_that_made_them(options: EvaluateOptions) -> None:
    before = results(options)
    evaluate(dataclasses.replace(options, rescore=True, engine="vllm", dtype="float16", tensor_parallel_size=8))
    after = results(options)
    assert after["engine"] == before["engine"] and after["provenance"] == before["provenance"]
    assert after["engine"]["kind"] == "transformers" and "vllm" not in "".join(after["engine"]["versions"])
    assert (after["engine"]["dtype"], after["engine"]["tensor_parallel_size"]) == ("auto", 1)
    [made] = after["provenance"]
    assert made["weights"]["name"] == options.model[0] and made["weights"]["model.safetensors"]
    assert made["runs"][0]["hardware"]["cores"] >= 1
    assert "engine transformers, float32" in (options.output / "report.md").read_text()


def test_grades_that_are_kept_are_reported_with_the_versions_that_gave_them(
    options: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = results(options)
    monkeypatch.setattr(evaluating, "grading_versions", lambda: {"math-verify": "99.0"})
    evaluate(options)
    assert results(options)["grading"] == before["grading"] != {"versions": {}}
    evaluate(dataclasses.replace(options, rescore=True))
    assert results(options)["grading"] == {"versions": {"math-verify": "99.0"}}


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_stopped_while_grading_again_the_command_of_before_gives_its_results(
    options: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (options.output / "results.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(evaluating, "_note_rescored", _stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(dataclasses.replace(options, rescore=True, answer_type="exact"))
    assert not any(one.correct for one in read_samples(options.output / SAMPLES))
    [result] = evaluate(options)
    assert result.accuracy == 0.5 and (options.output / "results.json").read_bytes() == before


def test_grades_of_other_rules_are_refused_with_what_gives_them(options: EvaluateOptions) -> None:
    evaluate(dataclasses.replace(options, rescore=True, answer_type="exact", answer_pattern="(a b)"))
    stored = "--answer-pattern '(a b)' --answer-type exact"
    with pytest.raises(UserError) as caught:
        evaluate(options)
    assert str(caught.value).endswith(
        f"the stored grades are by {stored}, and now no --answer-pattern --answer-type number is asked; give {stored}, "
        "or add --rescore to grade again as now asked"
    )


def test_answers_that_are_not_graded_are_graded_as_now_asked(options: EvaluateOptions) -> None:
    store = Store(options.output / "model/sums")
    samples = store.samples()
    store.samples_path.unlink()
    with store.journal(0) as journal:
        for one in samples:
            journal.add(Answer(**{each.name: getattr(one, each.name) for each in dataclasses.fields(Answer)}))
    [result] = evaluate(dataclasses.replace(options, answer_type="exact"))
    assert result.accuracy == 0
    with pytest.raises(UserError, match="the stored grades are by --answer-type exact"):
        evaluate(options)


def test_a_folder_without_answers_takes_other_settings_unless_a_task_is_running(
    options: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(options.output / "model/sums")
    other = dataclasses.replace(options, max_new_tokens=5)
    with pytest.raises(UserError, match=r"max_new_tokens was 4, now 5"):
        evaluate(other)
    store.samples_path.unlink()
    with store.journal(0):
        pass  # as a run whose engine failed at its first step leaves it
    with (
        JobFolder(options.output, "results.json").task_lock(3),
        pytest.raises(UserError, match=r"max_new_tokens was 4, now 5"),
    ):
        evaluate(other)
    monkeypatch.setattr("megatron_tpt.evaluation.asking.open_engine", _stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(other)
    assert json.loads(store.settings_path.read_text())["benchmark"]["max_new_tokens"] == 5 and not store.runs()


@pytest.mark.parametrize(
    ("signum", "end", "how"),
    [(signal.SIGINT, KeyboardInterrupt, "interrupted"), (signal.SIGTERM, SystemExit, "stopped by SIGTERM")],
)
def test_a_signal_that_ends_it_says_what_is_stored(
    signum: int,
    end: type[BaseException],
    how: str,
    options: EvaluateOptions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        os.kill(os.getpid(), signum)
        time.sleep(10)

    store = Store(options.output / "model/sums")
    store.finish(store.samples()[:1])
    monkeypatch.setattr("megatron_tpt.evaluation.asking.open_engine", interrupt)
    with pytest.raises(end):
        evaluate(options)
    assert caplog.messages[-1] == f"{how}: 1 of 2 answers stored; the same command resumes"


def test_a_folder_of_an_earlier_version_is_graded_and_resumed(options: EvaluateOptions) -> None:
    folder = options.output / "model/sums"
    (folder / "grading.json").unlink()
    (folder / "engine.json").write_text('{"dtype": "float32"}')
    settings = json.loads((folder / "settings.json").read_text())
    del settings["tokenizer"]
    (folder / "settings.json").write_text(json.dumps(settings))
    [result] = evaluate(options)
    assert result.accuracy == 0.5
    assert results(options)["engine"]["tensor_parallel_size"] is None and not results(options)["provenance"][0]["runs"]
    (folder / "engine.json").write_text("{}")
    evaluate(dataclasses.replace(options, rescore=True))
    (folder / "engine.json").write_text("[]")
    with pytest.raises(UserError, match=r"engine\.json: not a JSON object; remove it"):
        evaluate(options)


def test_another_tokenizer_is_refused(options: EvaluateOptions, tmp_path: Path) -> None:
    shutil.copytree(options.model[0], tmp_path / "other")
    make_tokenizer(tmp_path / "other", thinks=False)
    with pytest.raises(UserError, match="tokenizer was null, now"):
        evaluate(dataclasses.replace(options, tokenizer=str(tmp_path / "other")))


def test_answers_are_not_graded_while_a_task_adds_to_them(
    options: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(options.output / "model/sums")
    last = store.samples()[-1]
    answer = Answer(**{each.name: getattr(last, each.name) for each in dataclasses.fields(Answer)})
    monkeypatch.setattr(JobFolder, "task_lock", lambda self, task: task_lock(self.locks, task, timeout_s=0))
    with JobFolder(options.output, "results.json").task_lock(3), store.journal(3) as journal:
        with pytest.raises(TaskLocked, match="task 3 is being run already by process"):
            evaluate(dataclasses.replace(options, rescore=True))
        journal.add(answer)
    assert store.has_journals()
    evaluate(dataclasses.replace(options, rescore=True))
    assert not store.has_journals()


def test_an_incomplete_run_is_asked_before_it_is_graded_again(options: EvaluateOptions) -> None:
    store = Store(options.output / "model/sums")
    store.finish(store.samples()[:1])
    with pytest.raises(UserError, match="1 of 2 answers missing; run without --rescore first"):
        evaluate(dataclasses.replace(options, rescore=True))


def test_a_model_keeps_its_folder_beside_another_of_its_name(options: EvaluateOptions, tmp_path: Path) -> None:
    [model] = options.model
    other = str(tmp_path / "B/model")
    shutil.copytree(model, other)
    assert model_folders([model, other]) == [Path("A/model"), Path("B/model")]
    assert model_folders([model, other], options.output) == [Path("model"), Path("B/model")]
    assert model_folders([model + "/"], options.output) == [Path("model")]
    [result] = evaluate(dataclasses.replace(options, model=[model + "/"]))
    assert result.accuracy == 0.5
    # A served model's name never leads out of the output.
    assert model_folders(["x", "/y/x"]) == [Path("x"), Path("y/x")]
    with pytest.raises(UserError, match="named twice"):
        model_folders(["x", "../x"])


def test_results_that_a_command_replaces_are_named(options: EvaluateOptions, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(options.output / "model/sums", options.output / "model/more")
    path = options.output / "model/more/settings.json"
    path.write_text(path.read_text().replace('"name": null', '"name": "more"'))
    with caplog.at_level(logging.INFO):
        evaluate(dataclasses.replace(options, name="more"))
    assert f"no longer has {options.model[0]} on sums" in caplog.text
    loading = [message for message in caplog.messages if "loading" in message]
    assert loading[0] == f"loading libraries and the tokenizer of {options.model[0]}"


def test_one_engine_asks_all_benchmarks(options: EvaluateOptions) -> None:
    other = dataclasses.replace(options, name="second", engine="vllm")
    with pytest.raises(UserError, match="--engine is transformers for sums and vllm for second, but one for all"):
        evaluate([options, other])


def test_an_output_inside_a_file_is_refused(options: EvaluateOptions, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file/out"):
        with pytest.raises(UserError, match="file: is a file; choose another --output"):
            evaluate(dataclasses.replace(options, output=output))


def test_likelihoods_that_are_no_numbers_are_failures(asked: EvaluateOptions, tmp_path: Path) -> None:
    model = tmp_path / "nan"
    shutil.copytree(asked.model[0], model)
    weights = safetensors.torch.load_file(model / "model.safetensors")
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    safetensors.torch.save_file(broken, model / "model.safetensors", {"format": "pt"})
    data = write_problems(tmp_path / "one.jsonl", [{"prompt": "Yes or no?", "answer": "A"}])
    scored = dataclasses.replace(
        asked,
        model=[str(model)],
        data=data,
        output=tmp_path / "out",
        scoring="log-likelihood",
        choice_texts=["yes", "no"],
        answer_type="choice",
    )
    with pytest.raises(Fault, match="1 request failed"):
        evaluate(scored)
    assert results(scored)["models"][0]["failed_requests"] == 1
    [one] = read_samples(scored.output / "nan/one/samples.jsonl.zst")
    assert one.failure == "invalid_response: the log-likelihood is nan" and not one.log_likelihoods
