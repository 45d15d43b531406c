"""slurm/tool.sbatch on a real SLURM: a tool that is stopped before the time limit is queued again, and what depends on
it waits until it has succeeded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train_sbatch import wait_for_end
from toy_runs import wait_until

REPOSITORY = Path(__file__).parents[2]
# Its first start takes until it is stopped.
TOOL = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
number = len(list(folder.glob("begun-*")))
(folder / f"begun-{number}").touch()
time.sleep(0 if number else 1200)
"""


def submit(folder: Path, *command: str, **variables: str) -> str:
    """Submit a job, as slurm/pipeline.sh does. Returns its number."""
    environment = os.environ | {"PYTHON": sys.executable, "LOGS": str(folder), **variables}
    options = ["--parsable", "--kill-on-invalid-dep=yes", f"--output={folder}/%x.txt"]
    done = subprocess.run(
        ["sbatch", *options, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submit_and_stop(folder: Path, **variables: str) -> tuple[str, str]:
    """Submit the tool, and signal its job as SLURM does before the time limit. Returns the numbers of this job and of
    another that is to begin when it has succeeded, and fails where it has not."""
    (folder / "tool.py").write_text(TOOL)
    job = submit(folder, "slurm/tool.sbatch", f"{folder}/tool.py", str(folder), DONE=f"{folder}/done", **variables)
    after = submit(folder, "--job-name=after", f"--dependency=afterok:{job}", "--wrap", f"test -e {folder}/done")
    wait_until((folder / "begun-0").exists)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    return job, after


@pytest.mark.slow(minutes=1)
def test_a_tool_is_queued_again_when_it_is_stopped_and_marks_its_success(cluster: Path, tmp_path: Path) -> None:
    job, after = submit_and_stop(tmp_path)
    state, text = wait_for_end(job), (tmp_path / "tool.txt").read_text()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), text
    assert "stopped before the time limit; the job is queued again" in text
    assert (tmp_path / "begun-1").exists() and (tmp_path / "done").exists()
    for start in ("start-0", "start-1"):
        record = tmp_path / f"tool-{job}" / start
        assert str(tmp_path / "tool.py") in (record / "command.txt").read_text()
        assert list(record.glob("environment-*.json")) and "Megatron Core" in (record / "check.txt").read_text()
    assert wait_for_end(after)["JobState"] == "COMPLETED", "it has not waited for the second start"


@pytest.mark.slow(minutes=1)
def test_a_tool_is_not_queued_again_for_ever(cluster: Path, tmp_path: Path) -> None:
    job, after = submit_and_stop(tmp_path, MAX_REQUEUES="0")
    state, text = wait_for_end(job), (tmp_path / "tool.txt").read_text()
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0"), text
    assert "error: stopped before the time limit after 0 requeues: raise --time, or MAX_REQUEUES" in text
    assert not (tmp_path / "done").exists()
    assert wait_for_end(after)["JobState"] == "CANCELLED"
