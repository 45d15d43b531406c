"""A tiny model is asked all benchmarks whose files are there, in one command that is killed once and given again; then
a browser shows the report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluation_data import DATA, needs_data
from test_evaluate import TOOL, count_answers
from test_report import CHROMIUM, shown_by_browser
from tiny_models import CHAT_TEMPLATE, make_model

from megatron_tpt.evaluation.benchmark import names
from megatron_tpt.evaluation.options import EvaluateOptions, parse_benchmarks
from megatron_tpt.records import expand_sources, read_rows

LIMIT = 25
"""Problems of each benchmark."""


def local_benchmarks() -> list[EvaluateOptions]:
    """Those of this package, but suites, whose files are all there."""
    found = []
    for name in names():
        members = parse_benchmarks(["--model", "m", "--output", "o", "--benchmark", name])
        files = [file for run in members for file in (run.data_file, run.few_shot_file) if file is not None]
        if len(members) == 1 and all((DATA / file).is_file() for file in files):
            found += members
    return found


@needs_data
def test_every_local_file_of_problems_belongs_to_a_benchmark() -> None:
    files = {run.data_file for run in local_benchmarks()}
    assert files == {
        "aime24.jsonl", "boolq_800.jsonl", "cruxeval.jsonl", "gsm8k_test.jsonl", "hmmt_feb25.jsonl", "humaneval.jsonl",
        "jeebench.jsonl", "math500.jsonl", "mbpp_a.jsonl", "mmlu_pro_504_outputs.jsonl", "mmlu_test_570.jsonl",
        "olympiadbench_338.jsonl",
    }  # fmt: skip


@needs_data
@pytest.mark.example(minutes=2)
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_a_model_is_asked_all_of_them_in_one_command_that_resumes(tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", seed=1, context=16384, chat_template=CHAT_TEMPLATE)
    titles = [run.title for run in local_benchmarks()]
    command = [sys.executable, str(TOOL), "--model", model, "--output", str(tmp_path / "out"), "--data-dir", str(DATA)]
    command += ["--benchmark", *titles, "--limit", str(LIMIT), "--max-new-tokens", "16", "--num-samples", "1"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 900
    while (num_finished := sum(map(count_answers, (tmp_path / "out/hf").glob("*")))) < 3 * LIMIT:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    num_finished = sum(map(count_answers, (tmp_path / "out/hf").glob("*")))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    num_left = LIMIT * len(titles) - num_finished
    assert f"{num_left:,} of {num_left:,} answers" in done.stderr

    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [result["benchmark"] for result in results["models"]] == titles
    assert {(result["num_problems"], result["failed_requests"]) for result in results["models"]} == {(LIMIT, 0)}
    assert not any(result["grading_crashes"] for result in results["models"])
    for result in results["models"]:
        [source] = expand_sources([tmp_path / "out" / result["samples"]])
        rows = [row.value for row in read_rows(source) if row.value is not None]
        assert len(rows) == LIMIT and sum(row["correct"] for row in rows) == pytest.approx(LIMIT * result["accuracy"])
    if CHROMIUM is None:
        pytest.skip("there is no Chromium (set CHROMIUM to its program) to look at the report")
    page = shown_by_browser(tmp_path / "out" / "report.html", tmp_path)
    num_wrong = sum(round(LIMIT * (1 - result["accuracy"])) for result in results["models"])
    assert page.tags.count("details") == num_wrong and page.tags.count("h2") == len(titles) + 3
    assert all(title in page.text for title in titles)
