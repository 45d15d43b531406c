"""tools/augment.py as the tasks of a real SLURM array, and of a Ray cluster."""

import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from augment_runs import command, options_for, records, rejects, write_documents
from unruly_server import MODEL, UnrulyServer, unruly_server

NUM_DOCUMENTS = 20


@pytest.fixture
def server() -> Iterator[UnrulyServer]:
    with unruly_server() as server:
        yield server


def check_job(server: UnrulyServer, folder: Path, *executor: str) -> None:
    """Run a job of three tasks over one file; nothing may be lost or asked twice, and the card counts all of it."""
    texts = ["400 9 refused", *(f"ok 0 {i}" for i in range(1, NUM_DOCUMENTS))]
    rows = ({"id": f"d{i}", "text": text} for i, text in enumerate(texts))
    options = options_for(write_documents(folder / "documents.jsonl", rows), MODEL, folder / "out")
    chat = ["--engine", "endpoint", "--endpoints", server.url, "--api", "chat"]
    job = command(options, *chat, "--num-tasks", "3", *executor)
    done = subprocess.run(job, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "3 tasks: 3 finished" in done.stderr
    assert sorted(record.id for record in records(options.output)) == sorted(f"d{i}" for i in range(1, NUM_DOCUMENTS))
    assert [(reject["id"], reject["reason"]) for reject in rejects(options.output)] == [("d0", "engine_bad_request")]
    assert len(server.bodies) == NUM_DOCUMENTS
    card = (options.output / "README.md").read_text()
    assert f"| records | {NUM_DOCUMENTS - 1} |" in card and "| engine_bad_request | 1 " in card
    for task in range(3):
        assert (options.output / "logs" / f"task_{task:05d}.exit").read_text() == "0\n"


@pytest.mark.usefixtures("cluster")
def test_as_an_array_on_slurm(server: UnrulyServer, tmp_path: Path) -> None:
    check_job(server, tmp_path, "--executor", "slurm", "--cpus-per-task", "1", "--wait")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs the extra: pip install ".[ray]"')
def test_on_ray(server: UnrulyServer, tmp_path: Path) -> None:
    check_job(server, tmp_path, "--executor", "ray", "--num-workers", "2")
