"""A foreign checkpoint is data: none of its pickles can run code, wherever it is opened."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_tpt.errors import UserError
from megatron_tpt.training.checkpoint_files import write_checksums
from megatron_tpt.training.checkpoint_loading import read_trainer_state
from megatron_tpt.training.checkpoint_trust import METADATA, require_data_only

REPOSITORY = Path(__file__).resolve().parents[2]


class _Command:
    """Unpickled by an ordinary unpickler, it runs a shell command."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._proof}",)


def _run(arguments: list[Any]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run of two steps that has been trained once."""
    folder = tmp_path_factory.mktemp("run")
    recipe = {
        "run": {"output_dir": str(folder / "run"), "seed": 1, "threads_per_process": 1},
        "model": {
            "num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 1, "vocab_size": 64
        },
        "data": {"mock": True},
        "training": {
            "num_steps": 2, "sequence_length": 16, "global_batch_size": 1, "micro_batch_size": 1, "dtype": "float32"
        },
        "optimizer": {"learning_rate": 1.0e-3, "warmup_steps": 0},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = _run(["-m", "megatron_tpt.pretrain", folder / "recipe.yaml"])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "content",
    [
        lambda proof: pickle.dumps(_Command(proof)),
        lambda proof: pickle.dumps({"state_dict_metadata": [_Command(proof)]}, protocol=0),
        lambda proof: f"cbuiltins\neval\n(S'open({str(proof)!r}, \"w\")'\ntR.".encode(),
        lambda proof: b"ctorch\nload\n(S'x'\ntR.",
        lambda proof: b"ctorch.serialization\nos.system\n(S'touch x'\ntR.",
    ],
)
def test_a_description_that_asks_for_more_than_data_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / METADATA).write_bytes(content(tmp_path / "proof"))
    with pytest.raises(UserError, match="it could run code, and is refused"):
        require_data_only(tmp_path)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x05", b"no pickle at all", b"\x80\x04K\x01K\x02\x93."])
def test_a_damaged_description_is_a_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        require_data_only(tmp_path)


@pytest.mark.parametrize("name", ["../../secret.distcp", "/etc/passwd", "a/b.distcp", ".."])
def test_a_description_that_names_files_elsewhere_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    metadata = FileSystemReader(next((run / "run/checkpoints").glob("step_*"))).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = name
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="no file of this folder"):
        require_data_only(tmp_path)


def test_common_state_that_is_code_is_refused(run: Path, tmp_path: Path) -> None:
    evil = shutil.copytree(next((run / "run/checkpoints").glob("step_*")), tmp_path / "evil")
    for content in (pickle.dumps(_Command(tmp_path / "proof")), b"no pickle at all"):
        (evil / "common.pt").write_bytes(content)
        with pytest.raises(UserError, match="not data, or is damaged"):
            read_trainer_state(evil)
    assert not (tmp_path / "proof").exists()


def test_init_from_and_export_run_no_code_of_a_foreign_checkpoint(run: Path, tmp_path: Path) -> None:
    evil = shutil.copytree(next((run / "run/checkpoints").glob("step_*")), tmp_path / "evil")
    (evil / METADATA).write_bytes(pickle.dumps(_Command(tmp_path / "proof")))
    write_checksums(evil)
    out = tmp_path / "out"
    for arguments in (
        ["-m", "megatron_tpt.pretrain", run / "recipe.yaml", f"--run.output_dir={out}", f"--training.init_from={evil}"],
        ["tools/export_hf.py", "--checkpoint", evil, "--output", tmp_path / "model"],
    ):
        done = _run(arguments)
        assert done.returncode == 2
        assert "it could run code, and is refused" in done.stderr
    assert not (tmp_path / "proof").exists()


def test_resuming_runs_no_code_of_objects_inside_the_files(run: Path, tmp_path: Path) -> None:
    """The random state is a pickle of its own, inside a .distcp file: replaced by one of the same length."""
    folder = shutil.copytree(run / "run", tmp_path / "copy", symlinks=True)
    checkpoint = next((folder / "checkpoints").glob("step_*"))
    metadata = FileSystemReader(checkpoint).read_metadata()
    replaced = 0
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            file = io.BytesIO()
            torch.save(_Command(tmp_path / "proof"), file)
            evil = file.getvalue()
            path = checkpoint / place.relative_path
            content = bytearray(path.read_bytes())
            content += evil
            path.write_bytes(content)
            place.offset, place.length = len(content) - len(evil), len(evil)
            replaced += 1
    assert replaced
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    (checkpoint / "checksums.json").unlink()
    write_checksums(checkpoint)
    more = ["--training.num_steps=3", f"--run.output_dir={folder}"]
    done = _run(["-m", "megatron_tpt.pretrain", run / "recipe.yaml", *more])
    assert done.returncode == 2 and "holds an object that is not data" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "proof").exists()
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
