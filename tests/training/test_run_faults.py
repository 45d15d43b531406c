"""What machines and file systems do to a run: it is killed at the worst moment, loses a rank, cannot write any more."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from training_runs import PRETRAIN, finish, read_metrics, start_ranks, start_training

from megatron_tpt.training.checkpoint_files import checkpoint_named
from megatron_tpt.training.run_lock import LOCK

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe_of(recipe: dict, tmp_path: Path) -> Callable[..., Path]:
    """recipe_of(name, num_steps) writes a recipe that saves every second step in the run folder of that name."""

    def write(name: str, num_steps: int = 6) -> Path:
        path = tmp_path / f"{name}.yaml"
        changes = {
            "run": {"output_dir": str(tmp_path / name)},
            "training": {**recipe["training"], "num_steps": num_steps},
            "checkpoint": {"save_interval": 2, "keep_last": 2},
        }
        path.write_text(yaml.safe_dump({**recipe, **changes}))
        return path

    return write


def losses(run_folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run_folder)]


def wait_for_steps(process: subprocess.Popen, run_folder: Path, num_steps: int) -> None:
    metrics = run_folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= num_steps):
        time.sleep(0.05)


def resumes(path: Path, run_folder: Path) -> bool:
    """Whether a run of many steps continues, until it is asked to stop."""
    num_lines = len(read_metrics(run_folder))
    resumed = start_training(path)
    wait_for_steps(resumed, run_folder, num_lines + 2)
    resumed.terminate()
    output, _ = resumed.communicate()
    print(output)
    return resumed.returncode == 75 and "resumed from" in output


@pytest.mark.parametrize(
    ("moment", "newest"),
    [("rename:before", 2), ("rename:after", 4), ("replace:before", 4), ("replace:after", 4)],
)
def test_a_kill_where_a_checkpoint_gets_its_name_loses_nothing(
    moment: str, newest: int, recipe_of: Callable[..., Path], tmp_path: Path
) -> None:
    finish(start_training(recipe_of("unbroken")))
    path, latest = recipe_of("run"), tmp_path / "run/checkpoints/latest"
    killed = start_training(path, f"--kill={moment}", program="killed_pretrain")
    killed.communicate()
    assert killed.returncode == -9 and (tmp_path / "run" / LOCK).exists()
    assert checkpoint_named(latest).resolve().name == f"step_{newest:08d}"
    output = finish(start_training(path))
    assert f"at step {newest}" in output and "waiting up to" not in output
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")
    names = {path.name for path in latest.parent.iterdir()}
    assert names == {"step_00000004", "step_00000006", "latest"} and os.readlink(latest) == "step_00000006"


def test_the_other_ranks_end_when_one_is_killed_and_the_run_resumes(
    recipe_of: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe_of("run", num_steps=100_000)
    first, second = start_ranks(PRETRAIN, path, num_processes=2)
    wait_for_steps(first, tmp_path / "run", 3)
    second.kill()
    output = first.communicate(timeout=300)[0]
    second.communicate()
    assert first.returncode == 1 and "error: another rank has ended, or" in output and "Traceback" not in output
    assert not (tmp_path / "run" / LOCK).exists()
    assert resumes(path, tmp_path / "run")


def test_no_process_outlives_a_torchrun_that_is_killed(recipe_of: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe_of("run", num_steps=100_000)
    launcher = start_training(path, num_processes=2)
    wait_for_steps(launcher, tmp_path / "run", 3)
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for rank in alive:
        rank.kill()
    launcher.communicate()
    assert len(ranks) >= 2 and not alive
    assert resumes(path, tmp_path / "run")


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """frozen(folder) has nobody, root included, write in a folder any more, as on a file system gone read-only."""
    folders: list[Path] = []

    def freeze(folder: Path) -> None:
        if subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode:
            pytest.skip("needs a file system with chattr, and the right to it")
        folders.append(folder)

    yield freeze
    for folder in folders:
        subprocess.run(["chattr", "-i", str(folder)], check=True)


def test_a_folder_that_cannot_be_written_any_more_costs_checkpoints_until_the_last(
    frozen: Callable[[Path], None], recipe_of: Callable[..., Path], tmp_path: Path
) -> None:
    process = start_training(recipe_of("run", num_steps=30))
    wait_for_steps(process, tmp_path / "run", 3)
    for folder in (tmp_path / "run", tmp_path / "run/logs/heartbeats", tmp_path / "run/checkpoints"):
        frozen(folder)
    output, _ = process.communicate()
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "warning: the checkpoint" in output and "make the folder writable" in output
    assert "error: the checkpoint" in output.splitlines()[-1] and read_metrics(tmp_path / "run")[-1]["step"] == 30


def test_without_shared_memory_a_run_works_but_for_processes_that_read_ahead(
    recipe_of: Callable[..., Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", PRETRAIN, str(recipe_of("run")), "--checkpoint.asynchronous=true"]
    without = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o ro,size=4k none /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*without, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to a mount namespace")
    refused = subprocess.run([*without, *command, "--data.num_workers=2"], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith("error: data.num_workers=2 needs shared memory")
    result = subprocess.run([*without, *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run")[-1][0] == 6


# A user with no more rights than its own, whom the interpreter's folders are open to: root without the right to all.
_WITHOUT_RIGHTS = ["setpriv", *(f"--{kind}=-dac_override,-dac_read_search" for kind in ("bounding-set", "inh-caps"))]


@pytest.mark.parametrize(
    ("umask", "reported"),
    [(0o077, "nothing can be written there"), (0o022, "nothing can be written there"), (0o002, None)],
)
def test_another_user_resumes_a_run_or_learns_what_is_missing(
    umask: int, reported: str | None, recipe_of: Callable[..., Path], tmp_path: Path
) -> None:
    if subprocess.run([*_WITHOUT_RIGHTS, "true"], capture_output=True).returncode:
        pytest.skip("needs setpriv, and root")
    path, run = recipe_of("run"), tmp_path / "run"
    command = [sys.executable, "-m", PRETRAIN, str(path)]
    subprocess.run([*command, "--training.num_steps=4"], check=True, capture_output=True, umask=umask)
    for place in [run, *run.rglob("*")]:
        os.chown(place, 10001, os.getgid(), follow_symlinks=False)
    if umask == 0o077:
        run.chmod(0o775)  # the folder itself is the group's
        reported = r"checkpoints is another user's (uid 10001), and this one has no right to write there"
    result = subprocess.run([*_WITHOUT_RIGHTS, *command], capture_output=True, text=True)
    assert result.returncode == (0 if reported is None else 2), result.stderr
    assert "Traceback" not in result.stderr and (reported is None or reported in result.stderr)
    assert losses(run)[-1][0] == (6 if reported is None else 4)
