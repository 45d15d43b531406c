"""tools/evaluate.py on the real vLLM engine with tiny models."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CHAT_TEMPLATE, CORPUS, make_model, unchanged_environment

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.arms import model_folders
from megatron_tpt.evaluation.evaluate import Sample, evaluate, summarize
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.evaluation.problems import read_problems
from megatron_tpt.generation import EngineOptions, Sampling, VLLMEngine, complete
from megatron_tpt.grading import after_thinking

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
    assert written["models"][0] == dataclasses.asdict(first)
    assert written["settings"]["max_new_tokens"] == 8

    assert [result["samples"] for result in written["models"]] == [
        "plain/hf/samples.jsonl",
        "augmented/hf/samples.jsonl",
    ]
    lines = (tmp_path / "out" / "plain" / "hf" / "samples.jsonl").read_text().splitlines()
    samples = [Sample(**json.loads(line)) for line in lines]
    assert [sample.correct for sample in samples] == [True] * 4 + [False] * 2
    assert [sample.id for sample in samples] == ["1", "2", "3", "4", "5", "6"]
    assert [sample.tier for sample in samples] == ["text"] * 4 + [None] * 2
    assert [sample.reason for sample in samples] == [None] * 4 + ["different"] * 2
    assert all(sample.output_tokens <= 8 for sample in samples)
    assert summarize(models[0], samples, 1.0, "x").accuracy == first.accuracy


def test_thinking_that_the_template_opened_and_the_limit_cut_is_no_answer(problems: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    model = make_model(tmp_path / "hf", seed=1, chat_template=template)
    options = EvaluateOptions(
        model=[model], data=problems, output=tmp_path / "out", max_new_tokens=8, limit=2, chat=True
    )
    [result] = evaluate(options)
    assert (result.accuracy, result.unclosed_thinking, result.extraction_failures) == (0, 2, 2)
    samples = [json.loads(line) for line in (tmp_path / "out" / result.samples).read_text().splitlines()]
    assert [(sample["extracted"], sample["reason"]) for sample in samples] == [(None, "thinking not closed")] * 2


def test_samples_differ_and_come_back_the_same(models: list[str], problems: Path, tmp_path: Path) -> None:
    options = EvaluateOptions(
        model=models[1:], data=problems, output=tmp_path / "a", max_new_tokens=8, num_samples=3, temperature=1, limit=2
    )
    [result] = evaluate(options)
    assert (result.num_problems, result.num_samples) == (2, 3)
    samples = (tmp_path / "a" / result.samples).read_bytes()
    assert len({json.loads(line)["output"] for line in samples.splitlines()}) > 2
    evaluate(dataclasses.replace(options, output=tmp_path / "b"))
    assert (tmp_path / "b" / result.samples).read_bytes() == samples


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


def test_the_error_is_taken_over_problems() -> None:
    def sample(name: str, correct: bool, why: str | None = None, finish: str = "stop") -> Sample:
        return Sample(name, 0, "", "", None if why else "1", "", correct, finish, 10, reason=why)

    samples = [sample("a", True), sample("a", True), sample("b", False, "no answer", "length"), sample("b", True)]
    result = summarize("m", samples, 2.0, "x")
    assert result.accuracy == 0.75
    assert result.stderr == pytest.approx(0.25)  # of 1.0 and 0.5, not of four samples
    assert (result.extraction_failures, result.truncated_fraction) == (1, 0.25)
    assert (result.mean_output_tokens, result.output_tokens_per_s) == (10, 20)
    assert summarize("m", samples[:2], 1.0, "x").stderr is None
    others = [sample("a", False, why) for why in ("thinking not closed", "time-out", "time-out", "crash", "different")]
    result = summarize("m", others, 1.0, "x")
    assert (result.extraction_failures, result.unclosed_thinking) == (1, 1)
    assert (result.grading_timeouts, result.grading_crashes) == (2, 1)


def test_every_model_has_a_folder_of_its_own() -> None:
    assert model_folders(["/runs/a/hf", "/runs/b/hf", "/other"]) == [Path("a/hf"), Path("b/hf"), Path("other")]
    assert model_folders(["Qwen/Qwen3-8B"]) == [Path("Qwen3-8B")]
    with pytest.raises(UserError, match="named twice"):
        model_folders(["/runs/a", "/runs/a"])


def test_mistakes_end_with_one_line_and_code_2_and_leave_nothing(
    models: list[str], problems: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "answer": "1"}\nno JSON\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    words = write_problems(tmp_path / "words.jsonl", [{"prompt": "a", "answer": "one"}])
    twice = write_problems(tmp_path / "twice.jsonl", [{"id": 1, "prompt": "a", "answer": "1"}] * 2)
    cases: list[tuple[str, Path, list[str]]] = [
        ("broken.jsonl:2: not JSON", broken, []),
        ("no problems in this file", empty, []),
        ("missing.jsonl: no such file or folder", tmp_path / "missing.jsonl", []),
        ("no column 'question'", problems, ["--prompt-template", "{question}"]),
        ("reference answer 'one' cannot be read", words, ["--answer-type", "number"]),
        ("ids must differ", twice, []),
        ("--allow-unsandboxed-code", problems, ["--answer-type", "code"]),
        ("omit --chat", problems, ["--chat"]),
        ("context is 512 tokens", problems, ["--max-new-tokens", "500"]),
        ("all the same", problems, ["--num-samples", "4"]),
    ]
    for message, data, more in cases:
        arguments = ["--model", models[0], "--data", str(data), "--output", str(tmp_path / "out"), *more]
        # Without bubblewrap on its path, the tool has no sandbox.
        result = subprocess.run(
            [sys.executable, str(TOOL), *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": "/nowhere"},
        )
        assert result.returncode == 2, (message, result.stderr)
        assert message in " ".join(result.stderr.split()), result.stderr
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "out").exists()
