"""A checkpoint whose files are missing or truncated is refused by export in one line."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import make_model

from megatron_tpt.errors import UserError
from megatron_tpt.interop.hf_export import export_hf
from megatron_tpt.interop.hf_import import import_hf
from megatron_tpt.interop.options import ExportOptions, ImportOptions

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
