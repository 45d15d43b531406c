"""Files and folders appear whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.files import _remove_leftovers, _temporary_prefix, atomic_directory, atomic_symlink, atomic_write


def test_a_file_appears_only_when_its_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "deep/file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"


def test_after_an_error_the_old_file_is_untouched_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_folder_appears_whole_and_is_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with atomic_directory(folder) as temporary:
        (temporary / "a").write_text("a")
        assert not folder.exists()
    with pytest.raises(UserError, match="exists by now"), atomic_directory(folder) as temporary:
        (temporary / "a").write_text("b")
    assert (folder / "a").read_text() == "a"
    assert os.listdir(tmp_path) == ["folder"]


def test_a_link_is_replaced_in_one_step(tmp_path: Path) -> None:
    for target in ("one", "two"):
        (tmp_path / target).mkdir()
        atomic_symlink(target, tmp_path / "latest")
        assert os.readlink(tmp_path / "latest") == target


def test_links_planted_under_the_names_of_temporary_files_are_not_followed(tmp_path: Path, monkeypatch: Any) -> None:
    """Even where the random part of the name is known: a link, or a foreign file, in its place is an error."""
    monkeypatch.setattr("megatron_tpt.files.secrets.token_hex", lambda _: "0")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "shared"
    folder.mkdir()
    planted = folder / f"{_temporary_prefix()}{os.getpid()}-0-report.md"
    for plant in (lambda: planted.symlink_to(victim), lambda: planted.write_text("foreign")):
        plant()
        with pytest.raises(FileExistsError), atomic_write(folder / "report.md") as temporary:
            temporary.write_text("ours")
        with pytest.raises(FileExistsError), atomic_directory(folder / "report.md"):
            pass
        planted.unlink()
    assert victim.read_text() == "precious"
    assert not os.listdir(folder)


# Begins a file and a folder, and is killed before either is whole.
KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_tpt.files import atomic_directory, atomic_write
folder = Path(sys.argv[1])
with atomic_directory(folder / "model") as model, atomic_write(folder / "picture.png"):
    (model / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_but_nothing_of_one_that_lives(tmp_path: Path) -> None:
    zombie = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    assert len(os.listdir(tmp_path)) == 2
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])  # removes what the other left
    assert len(os.listdir(tmp_path)) == 2
    kept = [
        f"{_temporary_prefix()}{os.getppid()}-00000000-report.md",  # its writer lives
        ".tmp-elsewhere-1-99999-00000000-report.md",  # of another machine
        f"{_temporary_prefix()}{'9' * 20}-00000000-report.md",  # of nobody
    ]
    for name in kept:
        (tmp_path / name).touch()
    _remove_leftovers.cache_clear()
    with atomic_write(tmp_path / "report.md") as temporary:
        temporary.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "report.md"])
    assert zombie.wait() == -signal.SIGKILL
