"""Files and folders appear whole or not at all."""

import os
from pathlib import Path

import pytest

from megatron_tpt.files import atomic_directory, atomic_symlink, atomic_write


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
    with pytest.raises(FileExistsError), atomic_directory(folder) as temporary:
        (temporary / "a").write_text("b")
    assert (folder / "a").read_text() == "a"
    assert os.listdir(tmp_path) == ["folder"]


def test_a_link_is_replaced_in_one_step(tmp_path: Path) -> None:
    for target in ("one", "two"):
        (tmp_path / target).mkdir()
        atomic_symlink(target, tmp_path / "latest")
        assert os.readlink(tmp_path / "latest") == target
