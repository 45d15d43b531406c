"""A job that is killed leaves no engine behind, and the same command resumes at once."""

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from augment_runs import command, options_for, records, rejects, write_documents
from tiny_models import CORPUS, make_model


@pytest.mark.slow
def test_the_engines_processes_end_with_the_job(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", context=1024)
    documents = write_documents(
        tmp_path / "documents.jsonl", ({"id": f"d{i}", "text": CORPUS[i % 3]} for i in range(40))
    )
    options = options_for(documents, model, tmp_path / "out", max_new_tokens=200)
    job = command(options, "--max-num-seqs", "2")
    # As on a GPU, where vLLM computes in a process of its own, with workers of its own.
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(job, env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, stderr=log)
    deadline = time.monotonic() + 300
    while not list((options.output / ".work" / "journal").glob("part-*")):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("EngineCore" in child.name() for child in family)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=120)
    for child in alive:
        child.kill()
    assert not alive
    assert subprocess.run(job).returncode == 0
    assert len(records(options.output)) + len(rejects(options.output)) == 40
