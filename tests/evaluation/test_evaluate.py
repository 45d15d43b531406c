"""tools/evaluate.py on the real vLLM engine with tiny models."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_models import CHAT_TEMPLATE, CORPUS, make_model, unchanged_environment

from megatron_tpt.errors import Fault, UserError
from megatron_tpt.evaluation.arms import model_folders
from megatron_tpt.evaluation.evaluate import evaluate
from megatron_tpt.evaluation.options import EvaluateOptions, parse_benchmarks
from megatron_tpt.evaluation.problems import read_problems
from megatron_tpt.evaluation.results import figures
from megatron_tpt.evaluation.samples import Answer, Journal, Sample, Store
from megatron_tpt.generation import EngineOptions, Failure, Sampling, VLLMEngine, complete
from megatron_tpt.grading import after_thinking
from megatron_tpt.records import expand_sources, read_rows

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with unchanged_environment():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("arms")
    return [
        make_model(folder / "plain" / "hf", seed=1),
        make_model(folder / "augmented" / "hf", seed=2, chat_template=CHAT_TEMPLATE),
    ]


def write_problems(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_samples(path: Path) -> list[Sample]:
    [source] = expand_sources([path])
    return [Sample(**row.value) for row in read_rows(source) if row.value is not None]


@pytest.fixture(scope="module")
def problems(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six problems; the first model's greedy answers are right to four of them."""
    prompts = [f"{text} {i}" for i in range(4) for text in CORPUS]
    with VLLMEngine(EngineOptions(models[0], max_model_len=256)) as engine:
        completions = complete(engine, prompts, Sampling(temperature=0, max_new_tokens=8))
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "answer": completion.text.strip()}
        for prompt, completion in zip(prompts, completions, strict=True)
        if (after_thinking(completion.text) or "") == completion.text and completion.text.strip()
    ][:6]
    assert len(rows) == 6
    for row in rows[4:]:
        row["answer"] = "something else"
    return write_problems(tmp_path_factory.mktemp("data") / "problems.jsonl", rows)


def test_models_are_evaluated_one_after_another(models: list[str], problems: Path, tmp_path: Path) -> None:
    options = EvaluateOptions(model=models, data=problems, output=tmp_path / "out", max_new_tokens=8)
    first, second = evaluate(options)
    assert (first.accuracy, first.num_problems, first.num_samples) == (4 / 6, 6, 1)
    assert first.stderr == pytest.approx((4 / 6 * 2 / 6 / 5) ** 0.5)
    assert second.accuracy == 0

    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [result["model"] for result in written["models"]] == models
    assert written["models"][0] == json.loads(json.dumps(dataclasses.asdict(first)))
    assert written["benchmarks"]["problems"]["max_new_tokens"] == 8
    [difference] = written["comparisons"]
    assert (difference["model"], difference["than"], difference["num_problems"]) == (models[1], models[0], 6)
    assert difference["difference"] == pytest.approx(-4 / 6)

    assert [result["samples"] for result in written["models"]] == [
        "plain/hf/problems/samples.jsonl.zst",
        "augmented/hf/problems/samples.jsonl.zst",
    ]
    samples = read_samples(tmp_path / "out" / first.samples)
    assert [sample.correct for sample in samples] == [True] * 4 + [False] * 2
    assert [sample.id for sample in samples] == ["1", "2", "3", "4", "5", "6"]
    assert [sample.tier for sample in samples] == ["text"] * 4 + [None] * 2
    assert [sample.reason for sample in samples] == [None] * 4 + ["different"] * 2
    assert all(0 < sample.output_tokens <= 8 for sample in samples)


def test_results_say_how_they_were_made(models: list[str], problems: Path, tmp_path: Path) -> None:
    options = EvaluateOptions(model=models[:1], data=problems, output=tmp_path, max_new_tokens=4, limit=2)
    evaluate(options)
    written = json.loads((tmp_path / "results.json").read_text())
    digest = hashlib.sha256(problems.read_bytes()).hexdigest()
    assert written["benchmarks"]["problems"]["data_sha256"] == f"sha256:{digest}"
    assert written["engine"]["versions"]["transformers"] == importlib.metadata.version("transformers")
    assert written["grading"]["versions"]["math-verify"] == importlib.metadata.version("math-verify")
    assert written["engine"]["dtype"] == "auto" and written["benchmarks"]["problems"]["seed"] == 0
    assert written["engine"]["computed_in"] == {models[0]: "float32"}
    assert written["environment"]["hardware"]["cores"] >= 1
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", written["environment"]["package"]["git_revision"])
    settings = json.loads((tmp_path / "hf/problems/settings.json").read_text())
    assert "model.safetensors" in settings["model"]


def test_thinking_that_the_template_opened_and_the_limit_cut_is_no_answer(problems: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    model = make_model(tmp_path / "hf", seed=1, chat_template=template)
    options = EvaluateOptions(
        model=[model], data=problems, output=tmp_path / "out", max_new_tokens=8, limit=2, chat=True
    )
    [result] = evaluate(options)
    assert (result.accuracy, result.unclosed_thinking, result.extraction_failures) == (0, 2, 2)
    samples = read_samples(tmp_path / "out" / result.samples)
    assert [(sample.extracted, sample.reason) for sample in samples] == [(None, "thinking not closed")] * 2
    assert all(sample.thinking_tokens == sample.output_tokens for sample in samples)


def test_samples_differ_and_come_back_the_same(models: list[str], problems: Path, tmp_path: Path) -> None:
    options = EvaluateOptions(
        model=models[1:], data=problems, output=tmp_path / "a", max_new_tokens=8, num_samples=3, temperature=1, limit=2
    )
    [result] = evaluate(options)
    assert (result.num_problems, result.num_samples) == (2, 3)
    samples = read_samples(tmp_path / "a" / result.samples)
    assert len(samples) == 6 and len({sample.output for sample in samples}) > 2
    assert list(result.pass_at) == list(result.majority_at) == ["2", "3"]
    evaluate(dataclasses.replace(options, output=tmp_path / "b"))
    assert read_samples(tmp_path / "b" / result.samples) == samples


def test_prompts_are_built_from_columns(tmp_path: Path) -> None:
    row = {"question": "How many?", "n": 3, "answer": "#### 3", "key": "k1"}
    data = write_problems(tmp_path / "data.jsonl", [row])
    (tmp_path / "shots.txt").write_text("Question: One?\nAnswer: 1\n\n")
    (tmp_path / "template.txt").write_text("{question} {n} \\frac{}\n")
    options = EvaluateOptions(model=["m"], data=data, output=tmp_path / "out", prompt_column="question")
    assert read_problems(options)[0].prompt == "How many?"

    inline = dataclasses.replace(
        options,
        prompt_template="Question: {question}\\nAnswer:",
        few_shot=tmp_path / "shots.txt",
        id_column="key",
    )
    [problem] = read_problems(inline)
    assert problem.prompt == "Question: One?\nAnswer: 1\n\nQuestion: How many?\nAnswer:"
    assert (problem.id, problem.answer) == ("k1", "#### 3")

    from_file = dataclasses.replace(options, prompt_template=str(tmp_path / "template.txt"))
    assert read_problems(from_file)[0].prompt == "How many? 3 \\frac{}\n"


def sample(name: str, correct: bool, why: str | None = None, finish: str = "stop", number: int = 0) -> Sample:
    return Sample(
        id=name,
        sample=number,
        prompt_hash="",
        output="",
        finish_reason=finish,
        output_tokens=10,
        thinking_tokens=4,
        prompt="",
        extracted=None if why else "1",
        reference="",
        correct=correct,
        reason=why,
    )


def test_the_error_is_taken_over_problems() -> None:
    samples = [sample("a", True), sample("a", True), sample("b", False, "no answer", "length"), sample("b", True)]
    result = figures("m", "b", samples, "x")
    assert result.accuracy == 0.75
    assert result.stderr == pytest.approx(0.25)  # of 1.0 and 0.5, not of four samples
    assert (result.extraction_failures, result.truncated_fraction) == (1, 0.25)
    assert (result.mean_output_tokens, result.thinking_tokens, result.answer_tokens) == (10, (4, 4), (6, 6))
    assert figures("m", "b", samples[:2], "x").stderr is None
    others = [sample("a", False, why) for why in ("thinking not closed", "time-out", "time-out", "crash", "different")]
    result = figures("m", "b", others, "x")
    assert (result.extraction_failures, result.unclosed_thinking) == (1, 1)
    assert (result.grading_timeouts, result.grading_crashes) == (2, 1)


def test_the_same_command_resumes_and_asks_nothing_twice(
    models: list[str], problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = EvaluateOptions(
        model=models[:1], data=problems, output=tmp_path / "whole", max_new_tokens=8, num_samples=2, temperature=1
    )
    evaluate(options)
    whole = (tmp_path / "whole/results.json").read_bytes()
    samples = read_samples(tmp_path / "whole/hf/problems/samples.jsonl.zst")
    assert "12 of 12 answers" in capsys.readouterr().err

    # What a killed run leaves: settings, and a journal whose last line is broken off.
    folder = tmp_path / "broken/hf/problems"
    with Journal(folder / ".answers-00000.jsonl") as journal:
        for one in samples[3:8]:
            journal.add(Answer(**{each.name: getattr(one, each.name) for each in dataclasses.fields(Answer)}))
    with (folder / ".answers-00000.jsonl").open("a") as file:
        file.write('{"id": "1", "sam')
    (folder / "settings.json").write_bytes((tmp_path / "whole/hf/problems/settings.json").read_bytes())
    evaluate(dataclasses.replace(options, output=tmp_path / "broken"))
    assert "7 of 7 answers" in capsys.readouterr().err
    assert (tmp_path / "broken/results.json").read_bytes() == whole
    assert not list(folder.glob(".answers*"))

    evaluate(dataclasses.replace(options, output=tmp_path / "broken"))
    assert "answers," not in capsys.readouterr().err  # no engine was started
    assert (tmp_path / "broken/results.json").read_bytes() == whole


@pytest.fixture(scope="module")
def whole_run(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], bytes]:
    """A command without its --output, and the results.json of a run of it that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    rows = [{"prompt": f"{CORPUS[i % 3]} {i}", "answer": "1"} for i in range(24)]
    data = write_problems(folder / "many.jsonl", rows)
    command = [sys.executable, str(TOOL), "--model", models[0], "--data", str(data), "--max-new-tokens", "200"]
    command += ["--max-num-seqs", "4", "--temperature", "1", "--num-samples", "2"]
    subprocess.run([*command, "--output", str(folder / "out")], check=True, capture_output=True)
    return command, (folder / "out/results.json").read_bytes()


@pytest.mark.slow(minutes=2)
@pytest.mark.timeout(1200)
def test_killed_in_mid_run_the_same_command_gives_the_same_results(
    whole_run: tuple[list[str], bytes], tmp_path: Path
) -> None:
    command = [*whole_run[0], "--output", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    folder = tmp_path / "killed/hf/many"
    deadline = time.monotonic() + 240
    while not any(path.stat().st_size for path in folder.glob(".answers-*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/results.json").exists()
    num_finished = count_answers(folder)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (tmp_path / "killed/results.json").read_bytes() == whole_run[1]
    [asked] = re.findall(r"([0-9]+) of ([0-9]+) answers, [0-9,]+ tokens, [0-9,]+ tokens/s\n", done.stderr)[-1:]
    assert asked == (str(48 - num_finished),) * 2 and num_finished > 0


@pytest.mark.slow(minutes=6)
@pytest.mark.timeout(1200)
def test_killed_with_its_servers_the_same_command_gives_the_same_results(models: list[str], tmp_path: Path) -> None:
    """First a server alone is killed, which the run survives; then the run, whose servers end with it."""
    rows = [{"prompt": f"{CORPUS[i % 3]} {i}", "answer": "1"} for i in range(40)]
    data = write_problems(tmp_path / "many.jsonl", rows)
    arguments = ["--model", models[0], "--data", str(data), "--max-new-tokens", "200", "--max-num-seqs", "2"]
    arguments += ["--temperature", "1", "--num-samples", "2", "--engine", "vllm-server"]

    def command(output: str) -> list[str]:
        return [sys.executable, str(TOOL), *arguments, "--output", str(tmp_path / output)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    whole = (tmp_path / "whole/results.json").read_bytes()
    folder = tmp_path / "killed/hf/many"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command("killed"), stderr=log, start_new_session=True)
    wait_for_answers(folder, 1, process)
    [server] = servers_of(process.pid)
    os.kill(server, signal.SIGKILL)
    wait_for_answers(folder, count_answers(folder) + 8, process)  # more than were on their way
    assert "it is restarted" in (tmp_path / "log").read_text()
    [server] = servers_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{server}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{server}").exists() and not (tmp_path / "killed/results.json").exists()
    num_finished = count_answers(folder)
    done = subprocess.run(command("killed"), check=True, capture_output=True, text=True)
    assert f"{80 - num_finished} of {80 - num_finished} answers" in done.stderr
    assert (tmp_path / "killed/results.json").read_bytes() == whole


def count_answers(folder: Path) -> int:
    """The answers that are whole in the journals of a run."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(".answers-*"))


def wait_for_answers(folder: Path, number: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 400
    while count_answers(folder) < number:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def servers_of(pid: int) -> list[int]:
    """The vLLM servers below a process, under their keepers."""
    names = {}
    for each in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            names[each.pid] = " ".join(each.cmdline())
    return [own for own, line in names.items() if "vllm.entrypoints" in line and "generation.keeper" not in line]


def test_other_settings_are_refused_by_name(models: list[str], problems: Path, tmp_path: Path) -> None:
    options = EvaluateOptions(model=models[:1], data=problems, output=tmp_path, max_new_tokens=4, limit=2)
    evaluate(options)
    with pytest.raises(UserError, match=r"benchmark\.max_new_tokens was 4, now 5"):
        evaluate(dataclasses.replace(options, max_new_tokens=5))
    with pytest.raises(UserError, match="the stored grades are by --answer-type exact, and now --answer-type math is"):
        evaluate(dataclasses.replace(options, answer_type="math"))
    with pytest.raises(UserError, match=r'dtype was "auto", now "float32"'):
        evaluate(dataclasses.replace(options, dtype="float32"))


def test_answers_that_a_machine_would_compute_otherwise_are_refused(
    models: list[str], problems: Path, tmp_path: Path
) -> None:
    options = EvaluateOptions(model=models[:1], data=problems, output=tmp_path, max_new_tokens=4, limit=2)
    evaluate(options)
    folder = tmp_path / "hf/problems"
    (folder / "engine.json").write_text('{"dtype": "bfloat16"}')  # as another machine may choose
    evaluate(options)  # all answers are there
    (folder / "samples.jsonl.zst").unlink()
    with pytest.raises(UserError, match="computed in bfloat16, and the engine on this machine computes in float32"):
        evaluate(options)


def test_outputs_are_graded_again_without_a_model(
    models: list[str],
    problems: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = EvaluateOptions(model=models[:1], data=problems, output=tmp_path / "out", max_new_tokens=8)
    [before] = evaluate(options)
    outputs = [one.output for one in read_samples(tmp_path / "out" / before.samples)]
    again = dataclasses.replace(options, rescore=True, answer_pattern="zzz")
    monkeypatch.setattr("megatron_tpt.evaluation.asking.open_engine", None)
    capsys.readouterr()
    [after] = evaluate(again)
    assert after.accuracy == 0 and after.extraction_failures == 6
    error = capsys.readouterr().err
    assert "4 of 6 grades changed" in error and "right, now None wrong" in error and "tokens/s" not in error
    assert [one.output for one in read_samples(tmp_path / "out" / after.samples)] == outputs
    with pytest.raises(UserError, match=r"--rescore grades the outputs that are there.*max_new_tokens was 8, now 9"):
        evaluate(dataclasses.replace(again, max_new_tokens=9))
    with pytest.raises(UserError, match="no outputs to grade again"):
        evaluate(dataclasses.replace(again, output=tmp_path / "nothing"))


def test_benchmarks_by_likelihood_and_by_generation_in_one_run(models: list[str], tmp_path: Path) -> None:
    write_problems(tmp_path / "yesno.jsonl", [{"q": text, "answer": i % 2 == 0} for i, text in enumerate(CORPUS)])
    (tmp_path / "likely.yaml").write_text(
        f"data: {tmp_path / 'yesno.jsonl'}\nprompt_template: '{{q}} True?'\nchoice_texts: ['no', 'yes']\n"
        "answer_type: boolean\nscoring: log-likelihood\n"
    )
    (tmp_path / "written.yaml").write_text(
        f"data: {tmp_path / 'yesno.jsonl'}\nprompt_column: q\nanswer_type: boolean\nmax_new_tokens: 4\n"
    )
    (tmp_path / "both.yaml").write_text(
        f"benchmark: ['{tmp_path / 'likely.yaml'}', '{tmp_path / 'written.yaml'}']\nlimit: 2\n"
    )
    arguments = ["--benchmark", str(tmp_path / "both.yaml"), "--model", models[0], "--output", str(tmp_path / "out")]
    scored, written = evaluate(parse_benchmarks(arguments))
    assert (scored.benchmark, scored.num_problems, scored.mean_output_tokens) == ("likely", 2, 0)
    assert (written.benchmark, written.num_problems) == ("written", 2)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models[0])
    network = AutoModelForCausalLM.from_pretrained(models[0])
    for one, text in zip(read_samples(tmp_path / "out" / scored.samples), CORPUS, strict=False):
        for word, total in zip(("no", "yes"), one.log_likelihoods, strict=True):
            prompt = tokenizer(f"{text} True?").input_ids
            ids = tokenizer(f"{text} True? {word}").input_ids
            logits = network(torch.tensor([ids])).logits[0].log_softmax(-1)
            own = sum(logits[at - 1, ids[at]].item() for at in range(len(prompt), len(ids)))
            assert total == pytest.approx(own, abs=1e-3)
        assert one.output == max(zip(one.log_likelihoods, ("no", "yes"), strict=True))[1]


class _FailsOnce:
    """The real engine, one of whose requests fails."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.max_model_len, self.dtype = engine.max_model_len, engine.dtype

    def generate(self, requests: Any) -> Iterator[Any]:
        for place, (request, outcome) in enumerate(self._engine.generate(requests)):
            yield request, Failure("timeout", "no answer in time") if place == 2 else outcome


def test_one_failed_request_does_not_end_the_run_and_is_asked_again(
    models: list[str], problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_tpt.evaluation import asking

    options = EvaluateOptions(model=models[:1], data=problems, output=tmp_path / "out", max_new_tokens=8)
    opened = asking.open_engine

    @contextlib.contextmanager
    def failing(*arguments: Any) -> Iterator[Any]:
        with opened(*arguments) as engine:
            yield _FailsOnce(engine)

    with monkeypatch.context() as patched:
        patched.setattr(asking, "open_engine", failing)
        with pytest.raises(Fault, match="1 request failed, counted as wrong; the same command asks again"):
            evaluate(options)
    written = json.loads((tmp_path / "out/results.json").read_text())["models"][0]
    assert (written["failed_requests"], written["num_problems"]) == (1, 6)
    [failed] = [one for one in read_samples(tmp_path / "out" / written["samples"]) if one.finish_reason == "failed"]
    assert (failed.reason, failed.detail) == ("request failed", "timeout: no answer in time")
    [result] = evaluate(options)
    assert (result.failed_requests, result.accuracy) == (0, 4 / 6)
    assert len(Store(tmp_path / "out/hf/problems").samples()) == 6


def test_every_model_has_a_folder_of_its_own() -> None:
    assert model_folders(["/runs/a/hf", "/runs/b/hf", "/other"]) == [Path("a/hf"), Path("b/hf"), Path("other")]
    assert model_folders(["Qwen/Qwen3-8B"]) == [Path("Qwen3-8B")]
    with pytest.raises(UserError, match="named twice"):
        model_folders(["/runs/a", "/runs/a"])


def test_mistakes_are_refused_before_a_model_is_loaded_and_leave_nothing(
    models: list[str], problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "answer": "1"}\nno JSON\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    words = write_problems(tmp_path / "words.jsonl", [{"prompt": "a", "answer": "one"}])
    twice = write_problems(tmp_path / "twice.jsonl", [{"id": 1, "prompt": "a", "answer": "1"}] * 2)
    wrong = {"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": ["{}"]}
    names = write_problems(tmp_path / "names.jsonl", [wrong])
    columns = ["--answer-columns", "instruction_id_list,kwargs"]
    cases: list[tuple[str, Path, list[str]]] = [
        ("broken.jsonl:2: not JSON", broken, []),
        ("no problems in this file", empty, []),
        ("missing.jsonl: no such file or folder", tmp_path / "missing.jsonl", []),
        (
            "no column 'question', which --prompt-template names as {question}; its columns are prompt",
            problems,
            ["--prompt-template", "{question}"],
        ),
        ("reference answer 'one' cannot be read", words, ["--answer-type", "number"]),
        ("names.jsonl:1: the reference answer", names, ["--answer-type", "instructions", *columns]),
        ("ids must differ", twice, []),
        ("--allow-unsandboxed-code", problems, ["--answer-type", "code"]),
        ("omit --chat", problems, ["--chat"]),
        ("context is 512 tokens", problems, ["--max-new-tokens", "500"]),
        ("all the same", problems, ["--num-samples", "4"]),
    ]
    monkeypatch.setattr("megatron_tpt.evaluation.asking.open_engine", None)
    monkeypatch.setenv("PATH", "/nowhere")  # without bubblewrap there is no sandbox
    for message, data, more in cases:
        arguments = ["--model", models[0], "--data", str(data), "--output", str(tmp_path / "out"), *more]
        with pytest.raises(UserError) as caught:
            evaluate(parse_benchmarks(arguments))
        assert message in " ".join(str(caught.value).split())
        assert not (tmp_path / "out").exists()


def test_a_mistake_ends_the_tool_with_one_line_and_code_2(models: list[str], problems: Path, tmp_path: Path) -> None:
    arguments = ["--model", models[0], "--data", str(problems), "--output", str(tmp_path / "out"), "--chat"]
    result = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True)
    assert (result.returncode, "omit --chat" in result.stderr, "Traceback" in result.stderr) == (2, True, False)
