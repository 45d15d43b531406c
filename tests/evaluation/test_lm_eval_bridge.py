"""lm-evaluation-harness on our engines, offline: a generation task, a log-likelihood task and perplexity."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluation_data import DATA, needs_data, rows
from tiny_models import CORPUS, make_model, unchanged_environment

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.evaluate import evaluate
from megatron_tpt.evaluation.lm_eval_bridge import EngineLM, local_tasks, sampling_of
from megatron_tpt.evaluation.options import EvaluateOptions, parse_benchmarks
from megatron_tpt.evaluation.problems import read_problems
from megatron_tpt.generation import Completion, EngineOptions, Request, load_tokenizer, open_engine
from megatron_tpt.grading import GraderPool, Item

COMMON = """
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
TASKS = {
    "sums": """
task: sums
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 8, do_sample: false}
filter_list:
- {name: plain, filter: [{function: regex, regex_pattern: "(?s)(.*)"}, {function: take_first}]}
metric_list: [{metric: exact_match}]
""",
    "drawn": """
task: drawn
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
repeats: 3
generation_kwargs: {until: ["zzz"], max_gen_toks: 8, do_sample: true, temperature: 1.0}
filter_list:
- {name: first, filter: [{function: take_first}]}
metric_list: [{metric: exact_match}]
""",
    "truths": """
task: truths
output_type: multiple_choice
doc_to_text: "{{prompt}} True?"
doc_to_choice: ["no", "yes"]
doc_to_target: "{{1 if truth else 0}}"
metric_list: [{metric: acc}]
""",
    "texts": """
task: texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: byte_perplexity}]
""",
}


GSM8K = """
include: {packaged}
task: gsm8k_local
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{train: {train}, test: {test}}}}}
"""


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with unchanged_environment():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "hf", seed=1)


@pytest.fixture(scope="module")
def harness(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The data, and the harness's results on the three tasks."""
    be_offline()
    from lm_eval import simple_evaluate

    folder = tmp_path_factory.mktemp("tasks")
    options = EngineOptions(model, max_model_len=256, kind="transformers")
    rows = [{"prompt": f"{text} {i}", "truth": i % 2 == 0, "answer": "unknown"} for i in range(2) for text in CORPUS]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text + COMMON.format(data=data))
    with open_engine(options, ["log-likelihood"]) as engine:
        lm = EngineLM(engine, load_tokenizer(model))
        done = simple_evaluate(
            lm, tasks=list(TASKS), task_manager=local_tasks(folder), log_samples=True, bootstrap_iters=0
        )
    return data, done


def test_the_harness_has_the_outputs_and_choices_of_our_own_evaluation(
    model: str, harness: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    data, done = harness
    common: dict[str, Any] = {"model": [model], "data": data, "engine": "transformers"}
    evaluate(EvaluateOptions(**common, output=tmp_path / "written", max_new_tokens=8, stop=["zzz"]))
    [scored] = evaluate(
        EvaluateOptions(
            **common, output=tmp_path / "scored", prompt_template="{prompt} True?", choice_texts=["no", "yes"],
            answer_column="truth", answer_type="boolean", scoring="log-likelihood",
        )
    )  # fmt: skip
    from test_evaluate import read_samples

    written = read_samples(tmp_path / "written/hf/rows/samples.jsonl.zst")
    assert [one["resps"][0][0] for one in done["samples"]["sums"]] == [one.output for one in written]
    assert done["results"]["truths"]["acc,none"] == scored.accuracy
    likelihoods = [one.log_likelihoods for one in read_samples(tmp_path / "scored/hf/rows/samples.jsonl.zst")]
    theirs = [float(resp[0][0]) for one in done["samples"]["truths"] for resp in one["resps"]]
    assert theirs == pytest.approx([value for one in likelihoods for value in one], abs=1e-4)
    assert done["results"]["texts"]["byte_perplexity,none"] > 1


def test_repeats_of_a_task_are_different_samples(harness: tuple[Path, dict[str, Any]]) -> None:
    texts = [one["resps"][0] for one in harness[1]["samples"]["drawn"]]
    assert [len(own) for own in texts] == [3] * 6 and all(len(set(own)) > 1 for own in texts)


def be_offline() -> None:
    import os

    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


class _Recorded:
    """An engine that gives outputs that other models wrote."""

    max_model_len = None

    def __init__(self, tokenizer: Any, questions: list[str], outputs: list[str]) -> None:
        self._tokenizer = tokenizer
        self._recorded = list(zip(questions, outputs, strict=True))

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        for request in requests:
            question, output = self._recorded[request.key]
            assert self._tokenizer.decode(request.prompt).endswith(f"Question: {question}\nAnswer:")
            yield request, Completion(output, (), "stop", 1, 1)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["6b_finetuning", "175b_verification"])
def test_the_harness_and_we_grade_the_same_outputs_of_gsm8k_alike(name: str, model: str, tmp_path: Path) -> None:
    be_offline()
    import lm_eval

    packaged = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    files = {"train": DATA / "gsm8k_train_1000.jsonl", "test": DATA / "gsm8k_test.jsonl"}
    (tmp_path / "gsm8k_local.yaml").write_text(GSM8K.format(packaged=packaged, **files))
    recorded = rows("gsm8k_graded_outputs")
    outputs = [row[name]["solution"] for row in recorded]
    tokenizer = load_tokenizer(model)
    engine = _Recorded(tokenizer, [row["question"] for row in recorded], outputs)
    lm = EngineLM(engine, tokenizer)  # type: ignore[arg-type]
    done = lm_eval.simple_evaluate(
        lm, tasks=["gsm8k_local"], task_manager=local_tasks(tmp_path), log_samples=True, bootstrap_iters=0
    )
    samples = [one for one in done["samples"]["gsm8k_local"] if one["filter"] == "flexible-extract"]
    theirs = {one["doc"]["question"]: bool(one["exact_match"]) for one in samples}

    [run] = parse_benchmarks(["--model", model, "--output", str(tmp_path), "--benchmark", "gsm8k"])
    problems = read_problems(run, DATA)
    with GraderPool(run.rules()) as pool:
        ours = pool.grade(Item(text, problem.answer) for text, problem in zip(outputs, problems, strict=True))
    assert len(theirs) == len(ours) == 1319
    assert [theirs[row["question"]] for row in recorded] == [grade.correct for grade in ours]
    assert done["results"]["gsm8k_local"]["exact_match,flexible-extract"] == pytest.approx(
        sum(grade.correct for grade in ours) / len(ours)
    )


def test_what_the_engines_do_not_have_is_refused() -> None:
    assert sampling_of({"until": "a", "max_gen_toks": 3, "do_sample": False, "temperature": 0.7}).temperature == 0
    assert sampling_of({"until": None, "temperature": 0.7}).temperature == 0.7
    with pytest.raises(UserError, match="generation_kwargs top_k: not known here"):
        sampling_of({"top_k": 5})
