"""The example of a new job, `word_counts.py`: split, killed, resumed, and refused with other settings."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from megatron_tpt.jobs.folder import JobFolder

TOOL = Path(__file__).with_name("count_words.py")
NUM_DOCUMENTS = 2000


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    for name in "ab":
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for i in range(NUM_DOCUMENTS // 2):
                file.write(json.dumps({"id": f"{name}{i}", "text": "word " * (i % 7 + 1)}) + "\n")
    return tmp_path


def command(documents: Path, *arguments: object, records_per_file: int = 50) -> list[str]:
    inputs = [str(documents / "a.jsonl"), str(documents / "b.jsonl")]
    where = ["--input", *inputs, "--output", str(documents / "counts"), "--records-per-file", str(records_per_file)]
    return [sys.executable, str(TOOL), *where, *map(str, arguments)]


def run(*arguments: object, **options: int) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(*arguments, **options), capture_output=True, text=True, check=False)  # type: ignore[arg-type]


def counts(documents: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in sorted((documents / "counts").glob("words-*.jsonl.zst")):
        lines = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().splitlines()
        assert not found.keys() & {json.loads(line)["id"] for line in lines}
        found |= {fields["id"]: fields["words"] for fields in map(json.loads, lines)}
    return found


EXPECTED = {f"{name}{i}": i % 7 + 1 for name in "ab" for i in range(NUM_DOCUMENTS // 2)}


def test_the_same_command_resumes_after_kill_9_and_other_settings_are_refused(documents: Path) -> None:
    process = subprocess.Popen(command(documents), stderr=subprocess.DEVNULL)
    while len(list((documents / "counts").glob("words-*"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in (documents / "counts").glob("words-*")}
    assert 3 <= len(kept) < 40
    refused = run(documents, records_per_file=60)
    assert refused.returncode == 2 and "(records_per_file was 50, now 60)" in refused.stderr
    resumed = run(documents)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{NUM_DOCUMENTS - 50 * len(kept):,} records, 0 bad records skipped; 100% of the input" in resumed.stderr
    assert {name: (documents / "counts" / name).stat().st_mtime_ns for name in kept} == kept
    assert counts(documents) == EXPECTED
    assert not list((documents / "counts").glob(".tmp-*"))


def test_tasks_on_this_machine_divide_the_work(documents: Path) -> None:
    done = run(documents, "--num-tasks", 3, "--num-workers", 2)
    assert done.returncode == 0, done.stderr
    assert counts(documents) == EXPECTED
    assert JobFolder(documents / "counts", "word_counts.json").states(3) == ["finished"] * 3
    assert len(list((documents / "counts" / ".work" / "progress").iterdir())) == 3


def test_tasks_on_slurm_divide_the_work(documents: Path, cluster: Path) -> None:
    done = run(documents, "--executor", "slurm", "--num-tasks", 3, "--cpus-per-task", 1, "--wait")
    assert done.returncode == 0, done.stderr
    assert "3 tasks: 3 finished" in done.stderr and counts(documents) == EXPECTED
