"""`latest` is the newest checkpoint for everybody, whatever copying has made of the link."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import PRETRAIN, Train, Workers, read_metrics

from megatron_tpt.files import atomic_symlink
from megatron_tpt.training import checkpoint_files
from megatron_tpt.training.checkpoint_files import checkpoint_named, point_latest, write_checksums


def make_checkpoint(checkpoints: Path, step: int) -> Path:
    folder = checkpoints / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(f"weights of step {step}")
    write_checksums(folder)
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two checkpoints of a run, without `latest`."""
    return [make_checkpoint(tmp_path, step) for step in (1, 2)]


def copied(folder: Path) -> Path:
    latest = folder.with_name("latest")
    shutil.copytree(folder, latest)
    return latest


def as_stale_link(latest: Path) -> None:
    latest.symlink_to("step_00000001")


def as_dangling_link(latest: Path) -> None:
    latest.symlink_to("step_00000009")


def as_link_to_elsewhere(latest: Path) -> None:
    elsewhere = make_checkpoint(latest.parent.parent / "elsewhere", 7)
    latest.symlink_to(elsewhere)


def as_file(latest: Path) -> None:
    latest.write_text("step_00000001")


def as_stale_copy(latest: Path) -> None:
    copied(latest.with_name("step_00000001"))


@pytest.mark.parametrize("become", [as_stale_link, as_dangling_link, as_link_to_elsewhere, as_file, as_stale_copy])
def test_readers_get_the_newest_and_the_next_checkpoint_puts_the_link_right(
    become: Callable[[Path], None], pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    latest = pair[1].with_name("latest")
    become(latest)
    assert checkpoint_named(latest) == pair[1]
    assert "no link to the newest checkpoint" in capsys.readouterr().out
    point_latest(pair[1])
    assert os.readlink(latest) == pair[1].name and {path.name for path in latest.parent.iterdir()} >= {"latest"}
    assert checkpoint_named(latest) == pair[1] and capsys.readouterr().out.count("no link") == 0


def test_any_other_name_is_what_it_says(pair: list[Path]) -> None:
    assert checkpoint_named(pair[0]) == pair[0]


def test_a_copy_is_kept_when_the_checkpoint_it_copies_is_damaged(pair: list[Path]) -> None:
    latest = copied(pair[0])
    (pair[0] / "weights").write_text("damaged of step 1")  # of the same length
    point_latest(pair[1])
    (kept,) = latest.parent.glob("copied-latest-*")
    assert (kept / "weights").read_text() == "weights of step 1" and os.readlink(latest) == pair[1].name


def test_of_two_copies_the_whole_one_is_read(pair: list[Path]) -> None:
    latest = copied(pair[1])
    (pair[1] / "weights").unlink()
    assert checkpoint_named(latest) == latest


def test_a_file_names_the_newest_where_there_are_no_links(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # what Linux answers for FAT

    monkeypatch.setattr(checkpoint_files, "atomic_symlink", refuse)
    latest = pair[1].with_name("latest")
    for folder in pair:
        point_latest(folder)
        assert latest.read_text() == f"{folder.name}\n"
    monkeypatch.setattr(checkpoint_files, "atomic_symlink", atomic_symlink)
    point_latest(pair[1])
    assert os.readlink(latest) == pair[1].name


def test_a_copied_run_goes_on_from_its_newest_checkpoint(train: Train, tmp_path: Path, workers: Workers) -> None:
    train("run", "--checkpoint.save_interval=10")
    unbroken = read_metrics(tmp_path / "run")
    checkpoints = tmp_path / "copy/checkpoints"
    latest, newest = checkpoints / "latest", checkpoints / "step_00000020"

    def resume(*overrides: str) -> str:
        arguments = [str(tmp_path / "run.yaml"), f"--run.output_dir={tmp_path / 'copy'}", *overrides]
        return workers.run(PRETRAIN, [*arguments, "--checkpoint.save_interval=10"], 2)

    def is_right() -> bool:
        return newest.is_dir() and os.readlink(latest) == newest.name

    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # follows links
    assert not latest.is_symlink()
    output = resume()
    assert "a copy of step_00000020: it is removed" in output and "at step 20" in output and is_right()

    latest.unlink()
    newest.rename(latest)  # the only copy
    assert f"resumes from {latest}: 0 of 20" in resume("--dry-run") and not latest.is_symlink()
    output = resume()
    assert f"the only copy: it is now {newest}" in output and "at step 20" in output and is_right()

    latest.unlink()
    shutil.copytree(newest, latest)
    (newest / "__0_0.distcp").unlink()  # the copy of the step lacks a file
    output = resume()
    assert "IS DAMAGED" in output and "at step 20" in output and is_right()

    shutil.rmtree(checkpoints / "step_00000010")
    newest.rename(tmp_path / newest.name)
    latest.unlink()
    latest.symlink_to(tmp_path / newest.name)
    with pytest.raises(AssertionError, match=r"UserError.*latest leads to .*step_00000020, and there is no checkpoint"):
        resume()
    assert [row["loss"] for row in read_metrics(tmp_path / "copy")] == [row["loss"] for row in unbroken]
