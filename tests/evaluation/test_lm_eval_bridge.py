"""lm-evaluation-harness on our engines, offline: a generation task, a log-likelihood task and perplexity."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CORPUS, make_model, unchanged_environment

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.evaluate import evaluate
from megatron_tpt.evaluation.lm_eval_bridge import EngineLM, local_tasks, sampling_of
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.generation import EngineOptions, load_tokenizer, open_engine

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
    import os

    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
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


def test_what_the_engines_do_not_have_is_refused() -> None:
    assert sampling_of({"until": "a", "max_gen_toks": 3, "do_sample": False, "temperature": 0.7}).temperature == 0
    assert sampling_of({"until": None, "temperature": 0.7}).temperature == 0.7
    with pytest.raises(UserError, match="generation_kwargs top_k: not known here"):
        sampling_of({"top_k": 5})
