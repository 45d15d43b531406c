"""A checkpoint whose files are missing or damaged is refused in one line."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import make_model

from megatron_tpt.errors import UserError
from megatron_tpt.interop.hf_export import export_hf
from megatron_tpt.interop.hf_import import import_hf
from megatron_tpt.interop.options import ExportOptions, ImportOptions
from megatron_tpt.training.checkpoint_loading import load_weights, read_trainer_state

DESCRIPTIONS = {
    "other bytes": b'{"sharded_back\xe5nd": "torch_dist", "sharded_backend_version": 1}',
    "truncated": b'{"sharded_backend": "torch',
    "empty": b"",
    "a list": b"[1]",
    "a number": b"7",
    "nothing in it": b"{}",
    "nested deeply": b"[" * 100_000 + b"]" * 100_000,
}
"""Contents of metadata.json."""
DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_cannot_be_read_are_named(damage: str, tmp_path: Path) -> None:
    import_hf(ImportOptions(Path(make_model(tmp_path / "model")), tmp_path / "checkpoint"))
    DAMAGES[damage](next((tmp_path / "checkpoint").glob("*.distcp")))
    with pytest.raises(UserError, match=r"checkpoint.*damaged"):
        export_hf(ExportOptions(tmp_path / "checkpoint", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_a_damaged_description_is_named(content: bytes, tmp_path: Path) -> None:
    import_hf(ImportOptions(Path(make_model(tmp_path / "model")), tmp_path / "checkpoint"))
    (tmp_path / "checkpoint/metadata.json").write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint is damaged \(.*metadata\.json"):
        read_trainer_state(tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"checkpoint is damaged \(.*metadata\.json"):
        load_weights(tmp_path / "checkpoint", [])
