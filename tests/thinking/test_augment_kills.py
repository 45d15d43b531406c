"""Jobs over GSM8K's questions that are killed again and again, and servers that are: nothing lost, nothing twice."""

import contextlib
import json
import random
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from augment_runs import command, options_for, records, rejects
from tiny_models import make_model
from vllm_servers import vllm_server

from megatron_tpt.records import read_records

DATA = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"
NUM_DOCUMENTS = 2000
NUM_JOB_KILLS = 20
NUM_SERVER_KILLS = 5
MAX_NUM_SEQS = 32
ROWS_PER_SHARD = 100

pytestmark = [
    pytest.mark.slow(minutes=12),
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not DATA.exists(), reason=f"needs GSM8K's training questions in {DATA}"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"), context=1024)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "questions.jsonl"
    lines = DATA.read_text().splitlines()[:NUM_DOCUMENTS]
    path.write_text("".join(json.dumps({"text": json.loads(line)["question"]}) + "\n" for line in lines))
    return path


@pytest.fixture
def server(model: str) -> Iterator[str]:
    """A vLLM server that outlives the jobs; its base URL."""
    settings = ("--max-num-seqs", str(MAX_NUM_SEQS), "--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192")
    with vllm_server(model, "--max-model-len", "1024", *settings) as url:
        yield url


def engine_counts(server: str, name: str, label: str) -> dict[str, int]:
    """One of the engine's own metrics, by the values of a label."""
    metrics = urllib.request.urlopen(f"{server}/metrics").read().decode()
    counts: dict[str, int] = {}
    for line in metrics.splitlines():
        if line.startswith(f"{name}{{"):
            value = line.partition(f'{label}="')[2].partition('"')[0]
            counts[value] = counts.get(value, 0) + int(float(line.rpartition(" ")[2]))
    return counts


def finished_requests(server: str) -> int:
    """How many requests the engine has answered to their end, once it is idle."""
    while sum(engine_counts(server, "vllm:num_requests_running", "engine").values()):
        time.sleep(0.1)
    counts = engine_counts(server, "vllm:request_success_total", "finished_reason")
    return counts["stop"] + counts["length"]


def num_journaled(output: Path) -> int:
    journals = list((output / ".work" / "journal").glob("part-*"))
    parts = {path.name.partition(".")[0] for path in output.glob("part-*")}
    parts -= {path.name.partition(".")[0] for path in journals}
    try:
        return sum(path.read_bytes().count(b"\n") for path in journals) + ROWS_PER_SHARD * len(parts)
    except FileNotFoundError:  # the job has finished a shard since they were listed
        return num_journaled(output)


def check_every_id_once(documents: Path, output: Path) -> None:
    ids = sorted([record.id for record in records(output)] + [reject["id"] for reject in rejects(output)])
    assert ids == sorted(record.id for record in read_records([documents]))
    assert not list((output / ".work" / "journal").iterdir())
    assert not list(output.rglob(".tmp-*part-*"))


def test_a_job_that_is_killed_twenty_times_asks_for_nothing_that_was_finished(
    documents: Path, model: str, server: str, tmp_path: Path
) -> None:
    chance = random.Random(time.time_ns())
    options = options_for(documents, model, tmp_path / "out", max_new_tokens=48, max_document_tokens=400)
    job = command(
        options, *("--engine", "endpoint", "--endpoints", f"{server}/v1", "--max-num-seqs", str(MAX_NUM_SEQS)),
        *("--rows-per-shard", str(ROWS_PER_SHARD)),
    )  # fmt: skip
    progress, lost = [], []
    for _ in range(NUM_JOB_KILLS):
        process = subprocess.Popen(job, stderr=subprocess.DEVNULL)
        before = num_journaled(options.output)
        if chance.random() < 0.2:  # some while it starts
            time.sleep(chance.uniform(0, 4))
        else:
            some = chance.randint(1, 2 * NUM_DOCUMENTS // NUM_JOB_KILLS)
            while num_journaled(options.output) < before + some and process.poll() is None:
                time.sleep(0.01)
        process.kill()
        process.wait()
        progress.append(num_journaled(options.output))
        lost.append(finished_requests(server) - progress[-1] - sum(lost))  # answers that did not reach the journal
    assert len(set(progress)) > NUM_JOB_KILLS // 2, progress
    assert min(lost) >= 0 and max(lost) <= MAX_NUM_SEQS, lost
    assert subprocess.run(job).returncode == 0
    check_every_id_once(documents, options.output)
    assert finished_requests(server) == NUM_DOCUMENTS + sum(lost)
    print(f"{NUM_DOCUMENTS} documents, {NUM_JOB_KILLS} kills: answers lost on their way to the journal at each {lost}")
    again = subprocess.run(job, capture_output=True, text=True)
    assert "nothing to do" in again.stderr
    assert finished_requests(server) == NUM_DOCUMENTS + sum(lost)


def test_a_job_whose_server_is_killed_five_times_ends_with_every_document(
    documents: Path, model: str, tmp_path: Path
) -> None:
    options = options_for(documents, model, tmp_path / "out", max_new_tokens=48, max_document_tokens=400)
    job = command(
        options,
        "--engine",
        "vllm-server",
        "--max-num-seqs",
        str(MAX_NUM_SEQS),
        *("--rows-per-shard", str(ROWS_PER_SHARD)),
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(job, stderr=log)
        for _ in range(NUM_SERVER_KILLS):
            before = num_journaled(options.output)
            while num_journaled(options.output) < before + 150 and process.poll() is None:
                time.sleep(0.05)
            assert process.poll() is None, (tmp_path / "log").read_text()
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # one that ended because another was killed
                    if "api_server" in " ".join(child.cmdline()) or "EngineCore" in child.name():
                        child.kill()
        assert process.wait() == 0, (tmp_path / "log").read_text()
    check_every_id_once(documents, options.output)
    assert not [reject for reject in rejects(options.output) if reject["reason"].startswith("engine_")]
