"""A full disk is reported in one line, and the same command completes the work when there is room."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_disk import small_disk
from tiny_models import make_model

from megatron_tpt.interop.hf_import import import_hf
from megatron_tpt.interop.options import ImportOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def fails_then_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Calls a tool whose output goes to disk/, a file system of limited size that grows after the first time."""
    monkeypatch.chdir(tmp_path)

    def run(tool: str, *arguments: str, num_bytes: int) -> None:
        monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py", *arguments])
        command = importlib.import_module(f"megatron_tpt.tools.{tool}").command
        with small_disk(tmp_path / "disk", num_bytes):
            with pytest.raises(SystemExit) as end:
                command()
            error = capsys.readouterr().err
            assert end.value.code == 2 and "Traceback" not in error, error
            [line] = [line for line in error.splitlines() if line.startswith("error: ")]
            assert any(text in line for text in ("disk is full", "No space left on device", "make room"))
            subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "disk")], check=True)
            with pytest.raises(SystemExit) as end:
                command()
            assert end.value.code == 0
            assert not list((tmp_path / "disk").glob(".tmp-*"))

    return run


@pytest.mark.parametrize("kib", [32, 48])
def test_a_set_of_shards(kib: int, model: str, tmp_path: Path, fails_then_succeeds) -> None:
    (tmp_path / "documents.jsonl").write_text('{"text": "The ferry leaves at nine."}\n' * 300)
    index = ["--input", "documents.jsonl", "--tokenizer", model, "--output", "disk/a", "--shard-size", "1KB"]
    fails_then_succeeds("index", *index, num_bytes=kib << 10)


@pytest.mark.parametrize("kib", [16, 300])
def test_an_imported_model(kib: int, model: str, fails_then_succeeds) -> None:
    fails_then_succeeds("import_hf", "--model", model, "--output", "disk/checkpoint", num_bytes=kib << 10)


@pytest.mark.parametrize("kib", [40, 300])
def test_an_exported_model(kib: int, model: str, tmp_path: Path, fails_then_succeeds) -> None:
    import_hf(ImportOptions(Path(model), tmp_path / "checkpoint"))
    fails_then_succeeds("export_hf", "--checkpoint", "checkpoint", "--output", "disk/model", num_bytes=kib << 10)


@pytest.mark.parametrize("program", ["tools/check_env.py", "tools/index.py --help", "-m megatron_tpt.pretrain --help"])
def test_standard_output(program: str) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, *program.split()], stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1] == "error: the disk is full; make room and run the same command again"
    assert "Traceback" not in process.stderr and "Exception ignored" not in process.stderr


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_the_log_of_a_task(num_blocks: int, tmp_path: Path) -> None:
    """There is room for the lock, and for the log or not."""
    logs = tmp_path / "disk/logs"
    command = [sys.executable, "-m", "megatron_tpt.jobs", "--task=0", "--num-tasks=1", "--log-dir", str(logs), "--"]
    with small_disk(tmp_path / "disk", num_blocks * 4096):
        process = subprocess.run([*command, "true"], capture_output=True, text=True)
        assert process.returncode == 2
        said = process.stderr + (logs / "task_00000.log").read_text()
        [line] = [line for line in said.splitlines() if not line.startswith("--- ")]
        assert re.fullmatch("error: .*the disk is full.*; make room and run the same command again", line)
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "disk")], check=True)
        assert subprocess.run([*command, "true"]).returncode == 0
