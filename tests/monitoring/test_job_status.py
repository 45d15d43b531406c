"""What is said of a job is what its tasks have left."""

import os
from pathlib import Path

from monitored import NOW, write

from megatron_tpt.jobs.folder import JobFolder, task_name
from megatron_tpt.monitoring.job_status import is_job, read_job


def _report(job: JobFolder, task: int, num_tasks: int, age_s: float = 10.0, **fields: float) -> None:
    write(job.progress_path(task, num_tasks), {"input_bytes": 1000, "input_bytes_done": 0} | fields, age_s)


def test_a_job_is_the_sum_of_its_tasks(tmp_path: Path) -> None:
    job = JobFolder(tmp_path, "job.json")
    _report(job, 0, 3, input_bytes_done=1000, thinking_tokens=9000, generation_s=10)
    job.note_finished(0, 3)
    _report(job, 1, 3, input_bytes_done=500, input_bytes_answered=400, thinking_tokens=200, generation_s=20)
    with job.task_lock(1):
        found = read_job(tmp_path, NOW)
    assert (found.kind, found.state) == ("job", "running")
    assert found.tasks == {"finished": 1, "running": 1, "waiting": 1}
    assert found.share == 0.75, "of what the tasks that have begun report"
    assert found.tokens_per_s == 10, "of the task that runs"
    assert found.remaining_s == 500 / 20
    assert found.heartbeat_age_s == 10 and not found.warnings
    assert read_job(tmp_path, NOW).state == "stopped", "without its lock task 1 does not run"
    for task in (1, 2):
        job.note_finished(task, 3)
    assert read_job(tmp_path, NOW).state == "finished"


def test_the_newest_split_counts(tmp_path: Path) -> None:
    job = JobFolder(tmp_path, "job.json")
    for task in range(4):
        _report(job, task, 4, age_s=5000)
    _report(job, 0, 1)
    assert read_job(tmp_path, NOW).tasks == {"stopped": 1}


def test_tasks_that_only_hold_locks_are_seen(tmp_path: Path) -> None:
    job = JobFolder(tmp_path, "job.json")
    with job.task_lock(2):
        found = read_job(tmp_path, NOW)
    assert found.state == "running" and found.tasks == {"waiting": 2, "running": 1}
    assert found.share is None and found.heartbeat_age_s is None


def test_failures_are_warnings_with_what_the_task_said(tmp_path: Path) -> None:
    job = JobFolder(tmp_path, "job.json")
    job.logs.mkdir()
    for task in range(7):
        _report(job, task, 7)
        (job.logs / f"task_{task:05d}.exit").write_text("2")
        (job.logs / f"task_{task:05d}.log").write_text("loading\nerror: --model NAME: not found\n")
    found = read_job(tmp_path, NOW)
    assert found.state == "failed" and len(found.warnings) == 6
    assert found.warnings[0] == "task 0 failed with exit code 2: --model NAME: not found"
    assert found.warnings[-1] == f"2 more tasks failed: see {job.logs}"


def test_a_folder_is_a_job_by_what_its_tasks_leave(tmp_path: Path) -> None:
    assert not is_job(tmp_path)
    os.makedirs(tmp_path / ".work/journal")
    assert not is_job(tmp_path)
    JobFolder(tmp_path, "job.json").note_finished(0, 1)
    assert is_job(tmp_path) and task_name(0, 1) in {path.name for path in tmp_path.rglob("task-*")}
