"""A full disk is told in one line, and the same command completes the work when there is room."""

import subprocess
import sys
from pathlib import Path

import pytest
from random_operations import TOOLS
from small_disk import small_disk
from tiny_models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kib", [16, 24, 32])
def test_a_set_of_shards(kib: int, model: str, tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text('{"text": "The ferry leaves at nine."}\n' * 300)
    command = [
        "index.py",
        "--input",
        "documents.jsonl",
        "--tokenizer",
        model,
        "--output",
        "disk/a",
        "--shard-size",
        "1KB",
    ]
    _fails_then_succeeds(command, tmp_path, kib)


@pytest.mark.parametrize("kib", [16, 300])
def test_an_imported_model(kib: int, model: str, tmp_path: Path) -> None:
    _fails_then_succeeds(["import_hf.py", "--model", model, "--output", "disk/checkpoint"], tmp_path, kib)


def _fails_then_succeeds(command: list[str], folder: Path, kib: int) -> None:
    with small_disk(folder / "disk", kib << 10):
        words = [sys.executable, str(TOOLS / command[0]), *command[1:]]
        failed = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert failed.returncode == 2, failed.stderr
        [line] = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
        assert "full" in line or "make room" in line or "No space left" in line
        assert "Traceback" not in failed.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder / "disk")], check=True)
        subprocess.run(words, cwd=folder, check=True)
        assert not list((folder / "disk").glob(".tmp-*"))
