"""How far a job says that it is: one task of itself, and all of them together from the folder."""

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from augment_runs import TOOL, good_texts, job, write_documents
from unruly_server import UnrulyServer, unruly_server

from megatron_tpt.errors import UserError
from megatron_tpt.jobs import progress as progress_module
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.jobs.progress import write_progress
from megatron_tpt.records import Record, write_records
from megatron_tpt.thinking.augment import augment, launch
from megatron_tpt.thinking.progress import AugmentProgress, read_progress
from megatron_tpt.thinking.shards import Output
from megatron_tpt.thinking.status import Status, status


@pytest.fixture
def server() -> Iterator[UnrulyServer]:
    with unruly_server() as running:
        yield running


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
def test_the_share_of_the_input_is_that_of_the_answered_documents(
    server: UnrulyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    seen: list[tuple[int, float]] = []

    def note(progress: AugmentProgress, path: Path) -> None:
        seen.append((progress.records, progress.input_bytes_done / progress.input_bytes))
        write_progress(progress, path)

    monkeypatch.setattr(progress_module, "_FILE_EVERY_S", 0.0)
    monkeypatch.setattr(progress_module, "write_progress", note)
    options = job(tmp_path, server, [], max_num_seqs=4, rows_per_shard=7)
    path = tmp_path / f"rows{suffix}"
    write_records(path, (Record(str(i), text) for i, text in enumerate(good_texts(40))))
    augment(dataclasses.replace(options, input=[str(path)]))
    assert len(seen) > 40 and seen[-1] == (40, 1.0)
    for records, share in seen:
        assert share == pytest.approx(records / 40, abs=0.06)


def test_all_tasks_together_say_how_far_the_job_is(server: UnrulyServer, tmp_path: Path) -> None:
    whole = job(tmp_path, server, [], scale=ScaleOptions(num_tasks=3), max_num_seqs=1)
    for name in "abc":
        write_documents(tmp_path / "in" / f"{name}.jsonl", ({"text": f"ok 0 {name}{i}"} for i in range(8)))
    whole = dataclasses.replace(whole, input=[str(tmp_path / "in")])
    with pytest.raises(UserError, match="no job was begun here"):
        status(whole)
    launch(whole, [sys.executable, "-c", "import sys; sys.exit('error: no GPU on this node')"])
    now = status(whole)
    assert now.states == ["failed"] * 3 and "0 records; 0 tokens/s in" in now.screen()
    assert "task 1 failed with exit code 1: no GPU on this node" in now.screen()

    augment(dataclasses.replace(whole, task=1))
    server.delay_s = 0.1
    (whole.output / "logs" / "task_00002.exit").unlink()
    running = threading.Thread(target=augment, args=[dataclasses.replace(whole, task=0)])
    running.start()
    while (now := status(whole)).states[0] != "running" or now.records < 9:
        assert running.is_alive()
        time.sleep(0.05)
    assert now.states == ["running", "finished", "waiting"]
    assert 8 < now.records < 16 and 1 / 3 < now.input_bytes_done / now.input_bytes < 2 / 3
    assert now.thinking_tokens_per_s > 0 and "left; tasks: 1 running, 1 waiting, 1 finished" in now.line()
    running.join()
    now = status(dataclasses.replace(whole, scale=ScaleOptions()))  # finds the split in the folder
    assert now.states == ["finished", "finished", "waiting"] and now.records == 16
    assert (
        now.line()
        == "16 records (100.0% accepted); 0 tokens/s in, 0 out; 66% of the input; tasks: 1 waiting, 2 finished"
    )


def test_the_time_left_is_that_of_all_tasks_at_the_speed_of_those_that_run(tmp_path: Path) -> None:
    # 2 of 8 tasks run; each has done 1 MB of its 4 MB in 100 s, so 30 MB are left at 20 kB/s.
    now = Status(tmp_path, ["running"] * 2 + ["waiting"] * 6, 32_000_000, tmp_path)
    for _ in range(2):
        half = AugmentProgress(
            records=10,
            generation_s=100,
            input_bytes=4_000_000,
            input_bytes_done=1_000_000,
            input_bytes_answered=1_000_000,
        )
        now.add(half, is_running=True)
    assert "6% of the input, 25 min left" in now.line()


def test_tasks_that_share_a_file_have_each_a_part_of_it(server: UnrulyServer, tmp_path: Path) -> None:
    whole = job(tmp_path, server, good_texts(40), rows_per_shard=2, scale=ScaleOptions(num_tasks=4))
    size = (tmp_path / "in.jsonl").stat().st_size
    augment(dataclasses.replace(whole, task=2))
    now, own = status(whole), read_progress(Output(whole.output).progress_path(2, 4))
    assert own is not None and own.input_bytes == own.input_bytes_done == now.input_bytes_done == round(size / 4)
    assert own.input_bytes_answered == pytest.approx(size / 4, rel=0.05)  # so that the time left fits
    assert (now.input_bytes, now.states) == (size, ["waiting", "waiting", "finished", "waiting"])


def test_what_earlier_runs_have_done_is_counted_once(server: UnrulyServer, tmp_path: Path) -> None:
    server.delay_s = 0.05
    options = job(tmp_path, server, [*good_texts(11), " "], max_num_seqs=1, rows_per_shard=4)
    ends: list[Any] = []

    def run() -> None:
        try:
            augment(options)
        except UserError as error:
            ends.append(error)

    first = threading.Thread(target=run)
    first.start()
    while len(server.bodies) < 6:  # one shard is done, the next one begun
        time.sleep(0.01)
    server.status = 401
    first.join()
    assert len(ends) == 1 and status(options).states == ["stopped"]
    assert 4 < status(options).records < 11
    server.status = None
    done = augment(options)
    assert done.records + done.records_before == 11 > done.records
    now = status(options)
    assert (now.states, now.records, now.rejects) == (["finished"], 11, {"empty text": 1})
    augment(options)
    assert status(options).records == 11


def test_the_program_shows_the_status_of_a_job_whose_model_is_elsewhere(server: UnrulyServer, tmp_path: Path) -> None:
    options = job(tmp_path, server, good_texts(3))
    augment(options)
    line = [sys.executable, str(TOOL), "--input", *options.input, "--output", str(options.output), "--model", "gone"]
    result = subprocess.run([*line, "--status"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "3 records (100.0% accepted)" in result.stdout and "100% of the input; tasks: 1 finished" in result.stdout
